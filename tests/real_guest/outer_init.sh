#!/bin/busybox sh
# The outer machine's first program: makes the host's root its own, without the power to change it, and runs the job.
b=/bin/busybox
share=trans=virtio,version=9p2000.L,msize=1048576

$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
# guests' memory is shared memory of the process that runs them: one page of 2 MiB takes one fault
echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled
while read -r module parameters; do
    $b insmod "/modules/$module" $parameters
done < /modules/order

# the host's files read-only, and over them a layer that goes away with this machine
$b mount -t tmpfs layer /layer
$b mkdir /layer/upper /layer/work
$b mount -t 9p -o "ro,cache=loose,$share" root /host
$b mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work over /new
for each in proc sys dev; do
    $b mount --move /$each /new/$each
done
$b mkdir -p /new/dev/pts /new/dev/shm
$b mount -t devpts pts /new/dev/pts
for each in dev/shm tmp run; do
    $b mount -t tmpfs tmp /new/$each
done
$b mkdir /new/run/job
$b mount -t 9p -o "cache=mmap,$share" job /new/run/job
$b ifconfig lo up 2>/dev/null

# the root of the namespace and not of a chroot, in which nobody may make a user namespace, as passt does
cd /new
$b mount --move . /
# $mine, a folder of the job, comes by the kernel's command line; what is there tells that the machine lives
while $b sleep 5; do
    $b cat proc/uptime > "run/job/$mine/alive"
done &
$b chroot . /bin/sh -c "sh /run/job/$mine/job.sh; echo \$? > /run/job/$mine/status" < dev/null > dev/ttyS0 2>&1
$b sync
$b poweroff -f
