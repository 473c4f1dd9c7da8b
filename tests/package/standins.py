"""Quick programs in the place of slow ones, for tests that are about something else.

They do to the files that matter what the real ones do, in the same order.
"""

from __future__ import annotations

# grub-mkconfig in small: the drop-ins under `set -e`, an entry for the newest kernel, then for
# each kernel one and its recovery. Like the original, it writes the target bit by bit.
UPDATE_GRUB = r"""#!/bin/sh
set -e
target=/boot/grub/grub.cfg
if [ "${1:-}" = -o ]; then target=$2; fi
GRUB_CMDLINE_LINUX= GRUB_CMDLINE_LINUX_DEFAULT=
. /etc/default/grub
for file in /etc/default/grub.d/*.cfg; do . "$file"; done
entry() {
    printf "menuentry 'Debian' --class os \$menuentry_id_option '%s' {\n" "$1"
    printf '\tlinux\t/boot/vmlinuz root=/dev/md0 ro %s\n}\n' "$2"
}
normal="$GRUB_CMDLINE_LINUX $GRUB_CMDLINE_LINUX_DEFAULT"
umask 077
{
    entry gnulinux-simple-1 "$normal"
    for kernel in /boot/vmlinuz-*; do
        entry "gnulinux-${kernel#*-}-advanced-1" "$normal"
        entry "gnulinux-${kernel#*-}-recovery-1" "single $GRUB_CMDLINE_LINUX"
    done
} >"$target.new"
cat "$target.new" >"$target"
rm "$target.new"
"""

# The package's own hook runs as ever; of the rest of an image there is one file.
UPDATE_INITRAMFS = r"""#!/bin/sh
set -e
case "$*" in "-u -k all" | "-c -k all") ;; *) exit 1 ;; esac
for kernel in /boot/vmlinuz-*; do
    image=/boot/initrd.img-${kernel#*-}
    DESTDIR=$(mktemp -d)
    export DESTDIR version="${kernel#*-}" __MODULES_TO_ADD=/dev/null
    echo rest >"$DESTDIR/init"
    script=/usr/share/initramfs-tools/scripts/init-top/dgx-kvm  # copied before any hook runs
    mkdir -p "$DESTDIR/scripts/init-top"
    if [ -e "$script" ]; then cp "$script" "$DESTDIR/scripts/init-top/"; fi
    hook=/usr/share/initramfs-tools/hooks/dgx-kvm
    if [ -x "$hook" ]; then "$hook"; fi
    cd "$DESTDIR"
    find . >"$DESTDIR.files"  # no pipes: the failure of all but the last would be lost
    cpio --quiet -o -H newc <"$DESTDIR.files" >"$DESTDIR.cpio"
    gzip -1 <"$DESTDIR.cpio" >"$image.new"
    mv "$image.new" "$image"
    rm -rf "$DESTDIR" "$DESTDIR.files" "$DESTDIR.cpio"
done
"""

# Of its work nothing is looked at, and it takes longer than all else in an installation.
PY3COMPILE = "#!/bin/sh\n"
