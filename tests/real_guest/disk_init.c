// The first program of a root file system on a disk: writes what it finds into the disk's files, and powers off.
//
// Static; the image holds nothing else. Each boot adds a line to /boots, with what from= on the kernel's command line
// says, which the kernel makes a variable of; and 32 bytes of the entropy device to /chance. It writes a report to
// /report where there is a sev-guest device.

#include <fcntl.h>
#include <linux/sev-guest.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <unistd.h>

static void say(const char *text)
{
    write(STDOUT_FILENO, text, strlen(text));
}

static int append(const char *path, const void *data, size_t size, int flags)
{
    int file = open(path, O_WRONLY | O_CREAT | flags, 0644);
    int bad = file < 0 || write(file, data, size) != (ssize_t)size || fsync(file) < 0;
    if (file >= 0)
        close(file);
    return bad;
}

static void chance(void)
{
    char data[32];
    int device = open("/dev/hwrng", O_RDONLY);
    if (device < 0 || read(device, data, sizeof data) != sizeof data)
        say("disk: no chance\n");
    else if (append("/chance", data, sizeof data, O_APPEND))
        say("disk: chance cannot be written\n");
    if (device >= 0)
        close(device);
}

static void report(void)
{
    static struct snp_report_req request;
    static struct snp_report_resp response;
    struct snp_guest_request_ioctl call = {
        .msg_version = 1,
        .req_data = (unsigned long)&request,
        .resp_data = (unsigned long)&response,
    };
    int device = open("/dev/sev-guest", O_RDWR);
    if (device < 0) {
        say("disk: no sev-guest\n");
        return;
    }
    memset(request.user_data, 'D', sizeof request.user_data);
    if (ioctl(device, SNP_GET_REPORT, &call) < 0)
        say("disk: no report\n");
    // the message: status, size, 24 reserved bytes, then 1184 bytes of report
    else if (append("/report", response.data + 32, 1184, O_TRUNC))
        say("disk: report cannot be written\n");
    close(device);
}

int main(void)
{
    char line[64];
    const char *from = getenv("from");
    snprintf(line, sizeof line, "from=%s\n", from ? from : "nowhere");
    say("disk: root mounted\n");
    if (append("/boots", line, strlen(line), O_APPEND))
        say("disk: cannot be written\n");
    chance();
    report();
    sync();
    mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
    say("disk: done\n");
    reboot(RB_POWER_OFF);
    return 1;
}
