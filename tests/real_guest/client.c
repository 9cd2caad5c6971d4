/* What a user's program does in an SNP guest, through the kernel's own driver and files only.
 *
 *   client CERTS    CERTS: a file with the certificates that the host has
 *
 * Prints a line for each thing: NAME VALUE, binary values in base64. Ends with "done"; "failed WHAT: WHY" otherwise.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/sev-guest.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define REPORT_OFFSET 0x20
#define REPORT_SIZE 1184
#define KEY_SIZE 32
#define CERTS_SIZE 0x4000
#define TSM "/sys/kernel/config/tsm/report/"

static const char *const features = "Memory Encryption Features active:";

static void fail(const char *what)
{
	printf("failed %s: %s\n", what, strerror(errno));
	exit(1);
}

static void print_base64(const char *name, const unsigned char *data, size_t size)
{
	static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

	printf("%s ", name);
	for (size_t i = 0; i < size; i += 3) {
		uint32_t word = data[i] << 16;

		word |= i + 1 < size ? data[i + 1] << 8 : 0;
		word |= i + 2 < size ? data[i + 2] : 0;
		putchar(digits[word >> 18]);
		putchar(digits[word >> 12 & 63]);
		putchar(i + 1 < size ? digits[word >> 6 & 63] : '=');
		putchar(i + 2 < size ? digits[word & 63] : '=');
	}
	putchar('\n');
}

/* The kernel's words */

static void uptime(const char *name)
{
	struct timespec now;

	clock_gettime(CLOCK_BOOTTIME, &now);
	printf("%s %lld.%03ld\n", name, (long long)now.tv_sec, now.tv_nsec / 1000000);
}

static void kernel_log(void)
{
	static char log[1 << 20];
	int size = klogctl(3, log, sizeof(log) - 1);

	if (size < 0)
		fail("kernel log");
	for (char *line = strtok(log, "\n"); line; line = strtok(NULL, "\n")) {
		char *found = strstr(line, features);

		if (found)
			printf("features %s\n", found + strlen(features) + 1);
	}
}

/* Files */

static size_t read_file(const char *path, unsigned char *data, size_t room)
{
	size_t size = 0;
	int file = open(path, O_RDONLY | O_CLOEXEC);

	if (file < 0)
		fail(path);
	for (ssize_t got = 1; got && size < room; size += got) {
		got = read(file, data + size, room - size);
		if (got < 0)
			fail(path);
	}
	close(file);
	return size;
}

/* What the host has, which the certificates that come are held against: too long for a slow console. */

static unsigned char host_certs[CERTS_SIZE];
static size_t host_certs_size;

static void print_certs(const char *name, const unsigned char *data, size_t size)
{
	int same = size >= host_certs_size && !memcmp(data, host_certs, host_certs_size);

	for (size_t i = host_certs_size; i < size; i++)
		same &= !data[i];
	printf("%s %zu %s\n", name, size, same ? "same" : "other");
}

/* /dev/sev-guest */

static int call(int device, unsigned long command, void *request, void *response, unsigned long long *exitinfo2)
{
	struct snp_guest_request_ioctl io = {
		.msg_version = 1,
		.req_data = (uintptr_t)request,
		.resp_data = (uintptr_t)response,
	};
	int result = ioctl(device, command, &io);

	*exitinfo2 = io.exitinfo2;
	return result;
}

static void reports(int device)
{
	static struct snp_report_resp response;
	unsigned long long exitinfo2;

	for (int i = 0; i < 3; i++) {
		struct snp_report_req request = { 0 };
		char name[16];

		memset(request.user_data, '1' + i, sizeof(request.user_data));
		if (call(device, SNP_GET_REPORT, &request, &response, &exitinfo2))
			fail("SNP_GET_REPORT");
		snprintf(name, sizeof(name), "report-%d", i + 1);
		print_base64(name, response.data + REPORT_OFFSET, REPORT_SIZE);
	}
}

static unsigned char certs[CERTS_SIZE] __attribute__((aligned(4096)));
static size_t certs_size;

static void extended(int device)
{
	static struct snp_report_resp response;
	struct snp_ext_report_req request = { .certs_address = (uintptr_t)certs };
	unsigned long long exitinfo2;

	memset(request.data.user_data, 'E', sizeof(request.data.user_data));
	int result = call(device, SNP_GET_EXT_REPORT, &request, &response, &exitinfo2);

	printf("without-room %d %d %#llx %u\n", result, result ? errno : 0, exitinfo2, request.certs_len);
	certs_size = request.certs_len;
	if (certs_size > sizeof(certs) || call(device, SNP_GET_EXT_REPORT, &request, &response, &exitinfo2))
		fail("SNP_GET_EXT_REPORT");
	print_base64("extended", response.data + REPORT_OFFSET, REPORT_SIZE);
	print_certs("certs", certs, certs_size);
}

static void key(int device, const char *name, uint64_t field_select)
{
	static struct snp_derived_key_resp response;
	struct snp_derived_key_req request = { .guest_field_select = field_select };
	unsigned long long exitinfo2;

	if (call(device, SNP_GET_DERIVED_KEY, &request, &response, &exitinfo2))
		fail("SNP_GET_DERIVED_KEY");
	print_base64(name, response.data + REPORT_OFFSET, KEY_SIZE);
}

/* What a report costs: the middle one of many, in microseconds. */

static int compare(const void *one, const void *other)
{
	long a = *(const long *)one, b = *(const long *)other;

	return a < b ? -1 : a > b;
}

static void report_time(int device)
{
	static struct snp_report_resp response;
	struct snp_report_req request = { 0 };
	unsigned long long exitinfo2;
	long times[11];

	for (int i = 0; i < 11; i++) {
		struct timespec from, to;

		clock_gettime(CLOCK_MONOTONIC, &from);
		if (call(device, SNP_GET_REPORT, &request, &response, &exitinfo2))
			fail("SNP_GET_REPORT");
		clock_gettime(CLOCK_MONOTONIC, &to);
		times[i] = (to.tv_sec - from.tv_sec) * 1000000 + (to.tv_nsec - from.tv_nsec) / 1000;
	}
	qsort(times, 11, sizeof(times[0]), compare);
	printf("report-us %ld\n", times[5]);
}

/* configfs-tsm */

static void print_text(const char *name, const char *path)
{
	unsigned char text[80];
	size_t size = read_file(path, text, sizeof(text) - 1);

	text[size] = 0;
	text[strcspn((char *)text, "\n")] = 0;
	printf("%s %s\n", name, (char *)text);
}

static void tsm(void)
{
	static unsigned char blob[0x8000];
	unsigned char nonce[64];
	struct stat there;

	if (stat(TSM, &there)) {
		printf("tsm none\n");
		return;
	}
	if (mkdir(TSM "r", 0700))
		fail(TSM "r");
	memset(nonce, 'T', sizeof(nonce));
	int file = open(TSM "r/inblob", O_WRONLY | O_CLOEXEC);

	if (file < 0 || write(file, nonce, sizeof(nonce)) != sizeof(nonce) || close(file))
		fail(TSM "r/inblob");
	print_text("tsm-provider", TSM "r/provider");
	print_base64("tsm-outblob", blob, read_file(TSM "r/outblob", blob, sizeof(blob)));
	size_t size = read_file(TSM "r/auxblob", blob, sizeof(blob));

	print_certs("tsm-auxblob", blob, size);
	print_text("tsm-generation", TSM "r/generation");
	if (rmdir(TSM "r"))
		fail("rmdir " TSM "r");
	printf("tsm done\n");
}

int main(int argc, char **argv)
{
	if (argc != 2)
		return 2;
	uptime("started");
	host_certs_size = read_file(argv[1], host_certs, sizeof(host_certs));
	kernel_log();
	printf("cpus %ld\n", sysconf(_SC_NPROCESSORS_ONLN));
	int device = open("/dev/sev-guest", O_RDWR | O_CLOEXEC);

	if (device < 0)
		fail("/dev/sev-guest");
	reports(device);
	extended(device);
	key(device, "key", 1);
	key(device, "key-again", 1);
	key(device, "other-key", 2);
	tsm();
	report_time(device);
	uptime("finished");
	printf("done\n");
	return 0;
}
