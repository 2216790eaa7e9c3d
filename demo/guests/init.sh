#!/usr/local/bin/busybox sh
# The guest's init: sets up what programs expect and runs commands for the host, one at a time, that come on the second
# serial port: "NUMBER BASE64\n", answered by "NUMBER STATUS BASE64\n" with what the command printed.
export PATH=/usr/bin:/usr/sbin:/usr/local/bin HOME=/root LC_ALL=C
mount -t sysfs sys /sys
mount -t tmpfs tmp /run
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
	# QEMU's user network.
	ip address add 10.0.2.15/24 dev eth0
	ip link set eth0 up
	ip route add default via 10.0.2.2
fi
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
echo ready >&3
while read -r number command <&3; do
	echo "$command" | base64 -d >/run/command
	/usr/bin/sh /run/command >/run/output 2>&1 3>&- </dev/null
	echo "$number $? $(base64 -w 0 /run/output)" >&3
done
