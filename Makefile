# make demo       the main job on a simulated DGX-2, end to end
# make test       all tests, linters and types
# make deb        the package, in build/deb
# make images     the guest images' packages, in build/images; IMAGES="debian-12 ..." for others
# make test-images  the same, then boots each by BIOS and by UEFI
# make repo       a signed apt repository of the packages that were built
# make bundle     the same with all they need, for a site without a network
# make lab        an emulated DGX-2 with the package installed, and its root console
# make lab-shell  the same without the package
# make lab-test   the story of an operator on the emulated DGX-2, unattended
# make bench      placement against the exact optimum; speed against the floor
# make docs       the man page and the bash completion, from the argument tree
# make format     put the code into its form
#
# As root on Debian 12 or later each target installs what it needs, with apt and, for the
# linter alone, pip. Tests use the system's Python and packages: what users get.

SHELL := /bin/bash
export PATH := /usr/sbin:/usr/bin:/sbin:/bin
export PYTHONDONTWRITEBYTECODE := 1
PYTHON := /usr/bin/python3
TOOLS := .cache/tools

RUN_PACKAGES := python3-libvirt python3-yaml python3-jinja2 python3-jsonschema python3-debian libvirt0 xorriso
TEST_PACKAGES := $(RUN_PACKAGES) man-db python3-pytest python3-pytest-xdist \
	python3-hypothesis python3-numpy python3-venv mypy shellcheck libvirt-daemon-system \
	libvirt-clients libxml2-utils qemu-system-x86 qemu-utils ovmf seabios iproute2 procps gnupg gpgv \
	dnsmasq-base fdisk iptables lvm2
BUILD_PACKAGES := $(RUN_PACKAGES) debhelper dh-python dpkg-dev pybuild-plugin-pyproject python3-all \
	python3-setuptools
OFFLINE_PACKAGES := apt-utils gnupg gpg-agent debian-archive-keyring
# Pinned: a newer linter may not find new faults in old code on the day of a release.
TOOL_PACKAGES := ruff==0.17.6 types-PyYAML==6.0.12.20261113 types-jsonschema==4.26.0.20261006

.PHONY: demo test lint unit integration package images test-images lab lab-shell lab-test bench \
	deb repo bundle docs format clean

demo: .cache/installed-run
	./demo

test: lint unit integration package

lint: .cache/installed-test $(TOOLS)/done deb
	$(TOOLS)/bin/ruff format --check .
	$(TOOLS)/bin/ruff check .
	$(TOOLS)/bin/python -m mypy
	shellcheck -x demo .ci/run tools/install.sh debian/host/{assignable,generator,host-mode,init-top} \
		debian/host/{initramfs-hook,live-host,qemu-hook} debian/tests/{cli,install-remove,mode-switch} \
		tests/lab/overlay/usr/local/sbin/lab-shell guest-images/hooks/* guest-images/debian/prerm
	shellcheck -s sh tests/lab/guest-init
	shellcheck -s sh debian/host/grub-guard.cfg
	rm -rf .cache/scripts && dpkg-deb --control build/deb/*.deb .cache/scripts
	shellcheck .cache/scripts/{preinst,postinst,prerm,postrm}

unit: .cache/installed-test docs
	$(PYTHON) -m pytest -n 2 -m "not integration and not package and not images"

package: .cache/installed-package deb
	$(PYTHON) -m pytest -n 2 -m package tests/package

integration: .cache/installed-test
	$(PYTHON) -m pytest -m integration tests/integration

# guest-images/README.md tells which there are. FRESH=1: with the archive's updates since the last
# time. UBUNTU_MIRROR=ADDRESS: where images of Ubuntu come from.
IMAGES := debian-11 debian-12 debian-13
images: .cache/installed-images
	$(PYTHON) -m tools.images build $(if $(FRESH),--fresh) $(IMAGES)

# Builds images, unless they are built, and boots each by BIOS and by UEFI.
test-images: .cache/installed-boot images
	IMAGES="$(IMAGES)" $(PYTHON) -m pytest -v -m images tests/images

export UBUNTU_MIRROR UBUNTU_KEYRING IMAGE_SOURCES
# The emulated DGX; tests/lab/README.md. RELEASE=trixie: on Debian 13. FULL=1: all that lab-test can.
LAB := PYTHONPATH=tests $(PYTHON) -m lab
RELEASE := bookworm
lab: .cache/installed-lab deb
	$(LAB) shell --installed --release $(RELEASE)

lab-shell: .cache/installed-lab
	$(LAB) shell --release $(RELEASE)

# PART=story is what every change is tried with; the air-gapped site needs three guest images.
# PART=cuts: SEED=N CUTS=N cut where another run has, or more often.
PART := story airgap
lab-test: .cache/installed-lab deb $(if $(FULL)$(filter airgap,$(PART)),images)
	$(LAB) test --release $(RELEASE) $(if $(FULL),--full,$(addprefix --part ,$(PART))) \
		$(if $(SEED),--seed $(SEED)) $(if $(CUTS),--cuts $(CUTS))

bench: .cache/installed-test
	$(PYTHON) -m bench.placement
	PYTHONPATH=tests $(PYTHON) -m bench.speed

# Built from a copy, so that nothing of the build stays in the tree or comes from it. -d: what it
# needs is installed by now, but for the compilers that Debian takes for granted.
DEB_WORK := .cache/deb
DEB_OUT := build/deb
deb: .cache/installed-deb
	@rm -rf $(DEB_WORK) && mkdir -p $(DEB_WORK)/tree $(DEB_OUT)
	@git ls-files -z --cached --others --exclude-standard | \
		xargs -0 sh -c 'for f; do [ ! -e "$$f" ] || echo "$$f"; done' sh | \
		tar -c --no-recursion -T - | tar -x -C $(DEB_WORK)/tree
	cd $(DEB_WORK)/tree && dpkg-buildpackage -us -uc -b -d >../log 2>&1 || { cat ../log; exit 1; }
	@rm -f $(DEB_OUT)/dgx-kvm-sw_* && cp $(DEB_WORK)/dgx-kvm-sw_* $(DEB_OUT)/
	@cd $(DEB_OUT) && sha256sum *.deb

# KEY=... signs with that key of your key ring; without it, one is made for this tree.
repo: .cache/installed-offline deb
	$(PYTHON) -m tools.repository

# For RELEASE; PACKAGES="dgx-kvm-sw ..." takes those instead of all that were built.
bundle: .cache/installed-offline deb
	$(PYTHON) -m tools.bundle $(RELEASE) $(PACKAGES)

docs: .cache/installed-run
	$(PYTHON) -m tools.documents build

format: $(TOOLS)/done
	$(TOOLS)/bin/ruff check --fix .
	$(TOOLS)/bin/ruff format .

clean:
	rm -rf build .cache/pytest .cache/mypy .cache/demo

# Installs only what is missing, so that a second run needs neither root nor network.
.cache/installed-run: PACKAGES := $(RUN_PACKAGES)
.cache/installed-test: PACKAGES := $(TEST_PACKAGES)
.cache/installed-lab: PACKAGES := $(BUILD_PACKAGES) $(OFFLINE_PACKAGES) mmdebstrap util-linux
.cache/installed-images: PACKAGES := $(RUN_PACKAGES) mmdebstrap debian-archive-keyring dosfstools \
	dpkg-dev e2fsprogs fdisk kmod mtools qemu-utils
.cache/installed-boot: PACKAGES := $(TEST_PACKAGES) lintian openssh-client
.cache/installed-package: PACKAGES := $(TEST_PACKAGES) $(BUILD_PACKAGES) mmdebstrap piuparts \
	autopkgtest git $(OFFLINE_PACKAGES)
.cache/installed-deb: PACKAGES := $(BUILD_PACKAGES)
.cache/installed-offline: PACKAGES := $(BUILD_PACKAGES) $(OFFLINE_PACKAGES)
.cache/installed-%: Makefile
	@mkdir -p .cache
	@missing=$$(for name in $(PACKAGES); do \
		dpkg-query -W -f '$${db:Status-Status}\n' $$name 2>/dev/null | grep -qx installed \
		|| echo $$name; done); \
	if [ -n "$$missing" ]; then \
		echo "installing $$missing" && apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends -y $$missing; \
	fi
	@touch $@

$(TOOLS)/done: Makefile .cache/installed-test
	$(PYTHON) -m venv --system-site-packages $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check $(TOOL_PACKAGES)
	@touch $@
