#!/bin/busybox sh
# First process of the guest: loads the drivers in the order of /modules and goes on from the disk.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
while read -r module; do
	insmod "$module" || echo "guest: $module does not load"
done </modules
mount -t ext4 -o rw /dev/vda /disk || exec poweroff -f
mount --move /proc /disk/proc
mount --move /dev /disk/dev
exec switch_root /disk /usr/local/sbin/guest-init
