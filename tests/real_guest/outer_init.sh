#!/bin/busybox sh
# The outer machine's first program: makes the host's root its own, without the power to change it, and runs the job.
b=/bin/busybox
share=trans=virtio,version=9p2000.L,msize=1048576

$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
while read -r module parameters; do
    $b insmod "/modules/$module" $parameters
done < /modules/order

# the host's files read-only, and over them a layer that goes away with this machine
$b mount -t tmpfs layer /layer
$b mkdir /layer/upper /layer/work
$b mount -t 9p -o "ro,cache=loose,$share" root /host
$b mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work over /root
for each in proc sys dev; do
    $b mount --move /$each /root/$each
done
$b mkdir -p /root/dev/pts /root/dev/shm
$b mount -t devpts pts /root/dev/pts
for each in dev/shm tmp run; do
    $b mount -t tmpfs tmp /root/$each
done
$b mkdir /root/run/job
$b mount -t 9p -o "cache=mmap,$share" job /root/run/job
$b ifconfig lo up 2>/dev/null

cd /
$b chroot /root /bin/sh -c 'sh /run/job/job.sh; echo $? > /run/job/status' < /root/dev/null > /root/dev/ttyS0 2>&1
$b sync
$b poweroff -f
