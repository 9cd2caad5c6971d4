/* Makes one call after the other and prints "name result" lines: 0, a value, or the errno's name. */
#include "client.h"
#include <linux/openat2.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/xattr.h>

static void say(const char *name, long result)
{
	printf("%s %s\n", name, result < 0 ? strerrorname_np(errno) : "ok");
}

static void say_stat(const char *name, int result, const struct stat *st)
{
	if (result)
		say(name, result);
	else
		printf("%s %o %u:%u %lu\n", name, st->st_mode, major(st->st_rdev), minor(st->st_rdev),
		       (unsigned long)st->st_nlink);
}

static void say_statx(const char *name, int result, const struct statx *st)
{
	if (result)
		say(name, result);
	else
		printf("%s %o %u:%u %u\n", name, st->stx_mode, st->stx_rdev_major, st->stx_rdev_minor, st->stx_nlink);
}

static long how_open(uint64_t flags, uint64_t mode, uint64_t resolve, size_t size)
{
	struct {
		struct open_how how;
		uint64_t more;
	} how = { { flags, mode, resolve }, 0 };

	return syscall(SYS_openat2, AT_FDCWD, DEVICE, &how, size);
}

static void paths(void)
{
	char text[64];
	struct stat st;
	struct statx stx;
	int dev = open("/dev", O_RDONLY | O_DIRECTORY);

	say("open O_RDONLY", open(DEVICE, O_RDONLY));
	say("open O_WRONLY", open(DEVICE, O_WRONLY));
	say("open O_RDWR", open(DEVICE, O_RDWR));
	say("open O_CREAT", open(DEVICE, O_RDWR | O_CREAT | O_TRUNC, 0600));
	say("open O_EXCL", open(DEVICE, O_RDWR | O_CREAT | O_EXCL, 0600));
	say("open O_DIRECTORY", open(DEVICE, O_RDONLY | O_DIRECTORY));
	say("open below", open(DEVICE "/x", O_RDONLY));
	say("open slash", open(DEVICE "/", O_RDONLY));
	say("open longer name", open(DEVICE "x", O_RDONLY));
	say("open unplain", open("//dev/./../dev//sev-guest", O_RDONLY));
	say("open dirfd", openat(dev, "sev-guest", O_RDONLY));
	say("open bad dirfd", openat(999, "sev-guest", O_RDONLY));
	say("open bad pointer", syscall(SYS_openat, AT_FDCWD, 8L, O_RDONLY));
	say("openat2", how_open(O_RDWR | O_CLOEXEC, 0, 0, sizeof(struct open_how)));
	say("openat2 larger", how_open(O_RDWR, 0, 0, sizeof(struct open_how) + 8));
	say("openat2 small", how_open(O_RDWR, 0, 0, 8));
	say("openat2 mode", how_open(O_RDWR, 0600, 0, sizeof(struct open_how)));
	say("openat2 beneath", how_open(O_RDWR, 0, RESOLVE_BENEATH, sizeof(struct open_how)));
	say("creat", creat(DEVICE, 0600));
	say_stat("stat", stat(DEVICE, &st), &st);
	say_stat("lstat", lstat(DEVICE, &st), &st);
	say_stat("fstatat dirfd", fstatat(dev, "sev-guest", &st, AT_SYMLINK_NOFOLLOW), &st);
	say_stat("fstatat allowing empty", fstatat(AT_FDCWD, DEVICE, &st, AT_EMPTY_PATH), &st);
	say_stat("stat slash", stat(DEVICE "/", &st), &st);
	say("stat bad buffer", syscall(SYS_newfstatat, AT_FDCWD, DEVICE, 8L, 0));
	say_statx("statx", statx(AT_FDCWD, DEVICE, 0, STATX_ALL, &stx), &stx);
	say("access F_OK", access(DEVICE, F_OK));
	say("access RW", access(DEVICE, R_OK | W_OK));
	say("access X", access(DEVICE, X_OK));
	say("access mode 8", access(DEVICE, 8));
	say("faccessat2", faccessat(AT_FDCWD, DEVICE, R_OK, AT_EACCESS));
	say("readlink", readlink(DEVICE, text, sizeof(text)));
	say("readlinkat", readlinkat(dev, "sev-guest", text, sizeof(text)));
	say("getxattr", getxattr(DEVICE, "user.x", text, sizeof(text)));
	printf("listxattr %zd\n", listxattr(DEVICE, text, sizeof(text)));
	printf("llistxattr %zd\n", llistxattr(DEVICE, text, sizeof(text)));
	say("mkdir", mkdir(DEVICE, 0700));
	say("rmdir", rmdir(DEVICE));
	say("unlink", unlink(DEVICE));
	say("unlinkat dir", unlinkat(AT_FDCWD, DEVICE, AT_REMOVEDIR));
	say("chdir", chdir(DEVICE));
	say("relative", chdir("/dev") ? -1 : open("sev-guest", O_RDONLY));
	say("io_uring_setup", syscall(SYS_io_uring_setup, 1, text));
}

static void descriptors(void)
{
	char text[64];
	struct iovec iov = { text, sizeof(text) };
	struct stat st;
	struct statx stx;
	struct epoll_event event = { .events = EPOLLIN };
	int fd = open(DEVICE, O_RDWR), reader = open(DEVICE, O_RDONLY), writer = open(DEVICE, O_WRONLY);
	struct pollfd pfd = { .fd = fd, .events = POLLIN | POLLOUT };

	say_stat("fstat", syscall(SYS_fstat, fd, &st), &st);
	say_stat("fstatat empty", fstatat(fd, "", &st, AT_EMPTY_PATH), &st);
	say_statx("statx empty", statx(fd, "", AT_EMPTY_PATH, STATX_ALL, &stx), &stx);
	say("fstat bad buffer", syscall(SYS_fstat, fd, 8L));
	fstat(dup2(fd, 50), &st);
	printf("fstat duplicate is a character device: %d\n", S_ISCHR(st.st_mode));
	say("read", read(fd, text, sizeof(text)));
	say("read of writer", read(writer, text, sizeof(text)));
	say("readv", readv(fd, &iov, 1));
	say("pread", pread(fd, text, sizeof(text), 0));
	say("write", write(fd, text, sizeof(text)));
	say("write of reader", write(reader, text, sizeof(text)));
	say("writev", writev(fd, &iov, 1));
	say("pwrite", pwrite(fd, text, sizeof(text), 0));
	say("lseek", lseek(fd, 0, SEEK_CUR));
	say("mmap", mmap(0, 4096, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED ? -1 : 0);
	say("epoll", epoll_ctl(epoll_create1(0), EPOLL_CTL_ADD, fd, &event));
	printf("poll %d %x\n", poll(&pfd, 1, 0), pfd.revents & (POLLIN | POLLOUT));
	printf("cloexec %d %d\n", fcntl(fd, F_GETFD), fcntl(open(DEVICE, O_RDONLY | O_CLOEXEC), F_GETFD));
	printf("access mode %d %d\n", fcntl(fd, F_GETFL) & O_ACCMODE, fcntl(reader, F_GETFL) & O_ACCMODE);
}

static void ioctls(void)
{
	struct snp_guest_request_ioctl arg;
	struct snp_report_req req;
	struct snp_report_resp resp;
	char *page = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *none = mmap(0, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int fd = open(DEVICE, O_RDONLY), null = open("/dev/null", O_RDWR);

	memset(&req, 0, sizeof(req));
	printf("report %d\n", report(fd, 1));
	say("null argument", ioctl(fd, SNP_GET_REPORT, 0));
	say("argument nowhere", ioctl(fd, SNP_GET_REPORT, ~0UL));
	say("argument not readable", ioctl(fd, SNP_GET_REPORT, none));
	argument(&arg, 0, &req, &resp);
	say("version 0", ioctl(fd, SNP_GET_REPORT, &arg));
	argument(&arg, 1, (void *)8, &resp);
	say("request nowhere", ioctl(fd, SNP_GET_REPORT, &arg));
	argument(&arg, 1, none, &resp);
	say("request not readable", ioctl(fd, SNP_GET_REPORT, &arg));
	argument(&arg, 1, &req, (void *)8);
	say("response nowhere", ioctl(fd, SNP_GET_REPORT, &arg));
	mprotect(page, 8192, PROT_READ);
	argument(&arg, 1, &req, page);
	say("response read-only", ioctl(fd, SNP_GET_REPORT, &arg));
	printf("response read-only untouched %d\n", page[0] == 0 && page[127] == 0);
	mprotect(page, 4096, PROT_READ | PROT_WRITE);
	argument(&arg, 1, &req, page + 4096 - 100);
	say("response half read-only", ioctl(fd, SNP_GET_REPORT, &arg));
	argument(&arg, 1, &req, page + 96);
	say("response up to the page's end", ioctl(fd, SNP_GET_REPORT, &arg));
	argument(&arg, 2, &req, &resp);
	say("fails with write-back", ioctl(fd, SNP_GET_REPORT, &arg));
	printf("exitinfo2 %llx\n", (unsigned long long)arg.exitinfo2);
	argument(&arg, 4, &req, &resp);
	printf("positive %d\n", ioctl(fd, SNP_GET_REPORT, &arg));
	argument(&arg, 1, &req, &resp);
	say("unknown number", ioctl(fd, _IO('S', 99), &arg));
	printf("exitinfo2 of unknown %llx\n", (unsigned long long)arg.exitinfo2);
	say("unknown number, null", ioctl(fd, _IO('S', 99), 0));
	memset(&resp, 0, sizeof(resp));
	say("TCGETS, zero", ioctl(fd, 0x5401, &resp));
	resp.data[0] = 1;
	say("TCGETS", ioctl(fd, 0x5401, &resp));
	printf("TCGETS wrote %02x%02x\n", resp.data[24], resp.data[25]);
	argument(&arg, 1, &req, &resp);
	say("64-bit number", syscall(SYS_ioctl, (long)fd, 0xffffffff00000000UL | SNP_GET_REPORT, &arg));
	say("on /dev/null", ioctl(null, SNP_GET_REPORT, &arg));
	say("on a file", ioctl(open("/proc/self/exe", O_RDONLY), SNP_GET_REPORT, &arg));
	say("not open", ioctl(900, SNP_GET_REPORT, &arg));
	say("negative", ioctl(-1, SNP_GET_REPORT, &arg));
	say("not open, in the range", ioctl(1000, 0x5401, &arg));
	close(fd);
	say("closed", ioctl(fd, SNP_GET_REPORT, &arg));
	dup2(null, 970);
	printf("foreign in the range %zd %ld\n", read(970, &resp, 1), (long)lseek(970, 0, SEEK_SET));
	say("foreign in the range, ioctl", ioctl(970, SNP_GET_REPORT, &arg));
	say("open path", ioctl(open(DEVICE, O_PATH), SNP_GET_REPORT, &arg));
}

int main(int argc, char **argv)
{
	setvbuf(stdout, 0, _IONBF, 0);
	if (argc != 2)
		return 2;
	if (!strcmp(argv[1], "paths"))
		paths();
	else if (!strcmp(argv[1], "descriptors"))
		descriptors();
	else if (!strcmp(argv[1], "ioctls"))
		ioctls();
	else
		return 2;
	return 0;
}
