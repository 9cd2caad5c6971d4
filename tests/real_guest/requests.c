// Asks for as many reports as its argument says, one after the other, and tells nanoseconds for each of them.
//
// The clock is read before and after all of them: a guest's may tick in milliseconds only.

#include <fcntl.h>
#include <linux/sev-guest.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <time.h>

static void ask(int device, long count)
{
    static struct snp_report_req request;
    static struct snp_report_resp response;
    struct snp_guest_request_ioctl call = {
        .msg_version = 1,
        .req_data = (unsigned long)&request,
        .resp_data = (unsigned long)&response,
    };
    for (long i = 0; i < count; i++)
        if (ioctl(device, SNP_GET_REPORT, &call) < 0) {
            perror("SNP_GET_REPORT");
            exit(1);
        }
}

int main(int argc, char **argv)
{
    struct timespec from, to;
    long count = argc == 2 ? atol(argv[1]) : 0;
    int device = open("/dev/sev-guest", O_RDWR);
    if (count < 1 || device < 0) {
        fprintf(stderr, "requests: wanted a count and /dev/sev-guest\n");
        return 2;
    }
    ask(device, 10);
    clock_gettime(CLOCK_MONOTONIC, &from);
    ask(device, count);
    clock_gettime(CLOCK_MONOTONIC, &to);
    printf("%.0f\n", ((to.tv_sec - from.tv_sec) * 1e9 + (to.tv_nsec - from.tv_nsec)) / count);
    return 0;
}
