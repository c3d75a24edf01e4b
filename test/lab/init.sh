#!/bin/bash
# Init of a lab guest (written out by package lab). Below: the host's root by hostfs, never written. Above: a tmpfs.
# /lab is the folder that the guest shares with its test; lab.share names it on the kernel's command line.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C
die() { echo "lab init: $*"; exec busybox poweroff -f; }
# busybox mounts, because mount(8) is set-uid: where the lab runs in a user namespace its owner looks like nobody.
mnt() { busybox mount "$@" || die "mount $*"; }
mnt -t proc proc /proc
for word in $(cat /proc/cmdline); do
	case $word in
	lab.share=*) share=${word#*=} ;;
	lab.name=*) name=${word#*=} ;;
	esac
done
busybox insmod "/usr/lib/uml/modules/$(uname -r)/kernel/fs/overlayfs/overlay.ko" || die "no overlay module"
mnt -t tmpfs -o size=70% tmpfs /mnt
mkdir -p /mnt/up /mnt/work /mnt/root
mnt -t overlay -o nosuid,lowerdir=/,upperdir=/mnt/up,workdir=/mnt/work overlay /mnt/root
cd /mnt/root || die "no root"
mnt -o move /proc proc
mnt -t sysfs sys sys
mnt -t devtmpfs dev dev
mkdir -p dev/pts dev/shm dev/misc
mnt -t devpts devpts dev/pts
# root too: an ordinary user cannot look into the host's.
for d in dev/shm run tmp root; do mnt -t tmpfs tmpfs $d; done
chmod 1777 tmp dev/shm
mkdir -p lib/modules lab run/lock/iscsi
mnt -t hostfs -o /usr/lib/uml/modules none lib/modules
mnt -t hostfs -o "$share" none lab
# No udev: libdlm and dlm_controld look in /dev/misc, the kernel puts the nodes into /dev.
for d in dlm-control dlm-monitor dlm_plock; do ln -s ../$d dev/misc/$d; done
[ -e dev/fd ] || ln -s /proc/self/fd dev/fd
busybox hostname "$name"
busybox ip link set lo up
echo "lab init: $name up after $(cut -d' ' -f1 proc/uptime) s"
chroot . /lab/bin/labagent </dev/null
die "labagent ended with $?"
