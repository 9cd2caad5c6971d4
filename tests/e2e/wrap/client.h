/* What the clients share: one request and its expected answer, as harness.py's device gives it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sev-guest.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define DEVICE "/dev/sev-guest"

static inline void argument(struct snp_guest_request_ioctl *arg, int version, void *req, void *resp)
{
	memset(arg, 0, sizeof(*arg));
	arg->msg_version = version;
	arg->req_data = (uintptr_t)req;
	arg->resp_data = (uintptr_t)resp;
}

/* Ask for a report over `number` and check every byte; 0, or what went wrong as an errno value. */
static inline int report(int fd, uint64_t number)
{
	struct snp_guest_request_ioctl arg;
	struct snp_report_req req;
	struct snp_report_resp resp;

	memset(&req, 0, sizeof(req));
	memset(&resp, 0, sizeof(resp));
	memcpy(req.user_data, &number, sizeof(number));
	argument(&arg, 1, &req, &resp);
	if (ioctl(fd, SNP_GET_REPORT, &arg))
		return errno;
	for (int i = 0; i < 64; i++)
		if (resp.data[i] != req.user_data[63 - i] || resp.data[64 + i] != req.user_data[i])
			return EBADMSG;
	for (size_t i = 128; i < sizeof(resp.data); i++)
		if (resp.data[i] != 0xa5)
			return EBADMSG;
	return 0;
}
