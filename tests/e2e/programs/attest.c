/* A client of /dev/sev-guest that knows nothing of swsnp: it includes the kernel's own header.
 *
 *   attest report OUT              SNP_GET_REPORT; writes the report
 *   attest extended OUT CERTS      SNP_GET_EXT_REPORT in two calls: ask for the size, then fetch
 *   attest key OUT                 SNP_GET_DERIVED_KEY
 *   attest refusals                one line per misuse: NAME RESULT ERRNO EXITINFO2
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/sev-guest.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define REPORT_OFFSET 0x20
#define REPORT_SIZE 1184

static void save(const char *path, const void *data, size_t size)
{
	FILE *file = fopen(path, "wb");

	if (!file || fwrite(data, 1, size, file) != size || fclose(file)) {
		perror(path);
		exit(1);
	}
}

static int call(int fd, unsigned long command, void *request, void *response, struct snp_guest_request_ioctl *io)
{
	memset(io, 0, sizeof(*io));
	io->msg_version = 1;
	io->req_data = (uintptr_t)request;
	io->resp_data = (uintptr_t)response;
	return ioctl(fd, command, io);
}

static void die(const char *what, const struct snp_guest_request_ioctl *io)
{
	fprintf(stderr, "%s: %s, exitinfo2 %#llx\n", what, strerror(errno), (unsigned long long)io->exitinfo2);
	exit(1);
}

static void check_status(const unsigned char *data)
{
	uint32_t status;

	memcpy(&status, data, sizeof(status));
	if (status) {
		fprintf(stderr, "firmware status %#x\n", status);
		exit(1);
	}
}

static void report(int fd, const char *out)
{
	struct snp_guest_request_ioctl io;
	struct snp_report_req request = { 0 };
	static struct snp_report_resp response;

	memset(request.user_data, 'R', sizeof(request.user_data));
	if (call(fd, SNP_GET_REPORT, &request, &response, &io))
		die("SNP_GET_REPORT", &io);
	check_status(response.data);
	save(out, response.data + REPORT_OFFSET, REPORT_SIZE);
}

static void extended(int fd, const char *out, const char *certs_out)
{
	struct snp_guest_request_ioctl io;
	struct snp_ext_report_req request = { 0 };
	static struct snp_report_resp response;
	static unsigned char certs[0x4000] __attribute__((aligned(4096)));

	memset(request.data.user_data, 'E', sizeof(request.data.user_data));
	request.certs_address = (uintptr_t)certs;
	request.certs_len = 0;
	if (!call(fd, SNP_GET_EXT_REPORT, &request, &response, &io)) {
		printf("size 0\n");
		exit(request.certs_len != 0);
	}
	if (errno != EIO || io.exitinfo2 != 0x100000000ULL)
		die("SNP_GET_EXT_REPORT for the size", &io);
	printf("size %u\n", request.certs_len);
	if (request.certs_len > sizeof(certs))
		exit(3);
	if (call(fd, SNP_GET_EXT_REPORT, &request, &response, &io))
		die("SNP_GET_EXT_REPORT", &io);
	check_status(response.data);
	save(out, response.data + REPORT_OFFSET, REPORT_SIZE);
	save(certs_out, certs, request.certs_len);
}

static void key(int fd, const char *out)
{
	struct snp_guest_request_ioctl io;
	struct snp_derived_key_req request = { .guest_field_select = 1 };
	static struct snp_derived_key_resp response;

	if (call(fd, SNP_GET_DERIVED_KEY, &request, &response, &io))
		die("SNP_GET_DERIVED_KEY", &io);
	check_status(response.data);
	save(out, response.data + REPORT_OFFSET, 32);
}

static void show(const char *name, int result, const struct snp_guest_request_ioctl *io)
{
	printf("%s %d %d %#llx\n", name, result, result < 0 ? errno : 0, io ? (unsigned long long)io->exitinfo2 : 0ULL);
}

static void refusals(int fd)
{
	struct snp_guest_request_ioctl io = { 0 };
	struct snp_report_req request = { 0 };
	struct snp_ext_report_req extended_request = { 0 };
	static struct snp_report_resp response;
	void *nowhere = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	void *read_only = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint32_t status;

	show("argument_unreadable", ioctl(fd, SNP_GET_REPORT, nowhere), NULL);
	show("unknown_ioctl_unreadable", ioctl(fd, _IO('S', 99), nowhere), NULL);
	io.req_data = (uintptr_t)&request;
	io.resp_data = (uintptr_t)&response;
	show("msg_version_0", ioctl(fd, SNP_GET_REPORT, &io), &io);
	io.msg_version = 1;
	show("unknown_ioctl", ioctl(fd, _IO('S', 99), &io), &io);
	show("no_request", call(fd, SNP_GET_REPORT, NULL, &response, &io), &io);
	show("no_response", call(fd, SNP_GET_REPORT, &request, NULL, &io), &io);
	show("request_unreadable", call(fd, SNP_GET_REPORT, nowhere, &response, &io), &io);
	show("response_unwritable", call(fd, SNP_GET_REPORT, &request, read_only, &io), &io);
	extended_request.certs_address = (uintptr_t)nowhere;
	extended_request.certs_len = 100;
	show("certs_len_unaligned", call(fd, SNP_GET_EXT_REPORT, &extended_request, &response, &io), &io);
	extended_request.certs_len = 0x5000;
	show("certs_len_too_large", call(fd, SNP_GET_EXT_REPORT, &extended_request, &response, &io), &io);
	memset(&request, 0, sizeof(request));
	request.rsvd[27] = 1;
	show("reserved_bytes", call(fd, SNP_GET_REPORT, &request, &response, &io), &io);
	memcpy(&status, response.data, sizeof(status));
	printf("reserved_bytes_status %#x\n", status);
	memset(&request, 0, sizeof(request));
	show("still_works", call(fd, SNP_GET_REPORT, &request, &response, &io), &io);
	io.msg_version = 2;
	io.exitinfo2 = 0;
	show("msg_version_2", ioctl(fd, SNP_GET_REPORT, &io), &io);
	show("key_is_wiped", call(fd, SNP_GET_REPORT, &request, &response, &io), &io);
}

int main(int argc, char **argv)
{
	int fd = open("/dev/sev-guest", O_RDWR | O_CLOEXEC);

	if (fd < 0) {
		perror("/dev/sev-guest");
		return 1;
	}
	if (argc == 3 && !strcmp(argv[1], "report"))
		report(fd, argv[2]);
	else if (argc == 4 && !strcmp(argv[1], "extended"))
		extended(fd, argv[2], argv[3]);
	else if (argc == 3 && !strcmp(argv[1], "key"))
		key(fd, argv[2]);
	else if (argc == 2 && !strcmp(argv[1], "refusals"))
		refusals(fd);
	else
		return 2;
	return 0;
}
