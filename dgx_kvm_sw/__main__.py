"""`python3 -m dgx_kvm_sw` is dgx-kvm."""

import sys

from dgx_kvm_sw.cli import main

if __name__ == "__main__":
    sys.exit(main())
