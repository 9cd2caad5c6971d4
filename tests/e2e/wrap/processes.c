/* One device, many threads and processes; prints what went wrong and "done" at the end. */
#include "client.h"
#include <sys/prctl.h>
#include <sys/un.h>

static int failures;

static void check(const char *what, int error)
{
	if (!error)
		return;
	printf("%s: %s\n", what, strerrorname_np(error));
	__atomic_add_fetch(&failures, 1, __ATOMIC_RELAXED);
}

static int end(void)
{
	if (!failures)
		puts("done");
	return failures != 0;
}

static int device(void)
{
	int fd = open(DEVICE, O_RDWR);

	if (fd < 0)
		check("open", errno);
	return fd;
}

static void reap_all(void)
{
	int status;

	while (wait(&status) > 0)
		check("child", status ? ECHILD : 0);
}

static int shared;

static void *many(void *number)
{
	struct stat st;

	for (uint64_t i = 0; i < 40; i++) {
		check("thread", report(shared, (uintptr_t)number << 32 | i));
		check("thread stat", stat(DEVICE, &st) ? errno : 0);
		check("thread foreign stat", stat("/", &st) ? errno : 0);
	}
	return 0;
}

static int threads(void)
{
	pthread_t all[16];

	shared = device();
	for (uintptr_t i = 0; i < 16; i++)
		pthread_create(&all[i], 0, many, (void *)i);
	for (int i = 0; i < 16; i++)
		pthread_join(all[i], 0);
	return end();
}

static int children(void)
{
	int fd = device();

	for (uint64_t child = 0; child < 8; child++)
		if (!fork()) {
			for (uint64_t i = 0; i < 10; i++)
				check("child", report(fd, child << 32 | i));
			_exit(failures != 0);
		}
	reap_all();
	if (!vfork())
		_exit(report(fd, 7) != 0);
	reap_all();
	return end();
}

static int duplicates(void)
{
	int fd = device(), pair[2];
	char byte = 0, control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control) };
	struct cmsghdr *head;

	check("dup", report(dup(fd), 1));
	check("dup2", report(dup2(fd, 100), 2));
	check("F_DUPFD", report(fcntl(fd, F_DUPFD_CLOEXEC, 200), 3));
	check("dup2 to stdin", report(dup2(fd, 0), 4));
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		check("socketpair", errno);
	memset(control, 0, sizeof(control));
	head = CMSG_FIRSTHDR(&msg);
	head->cmsg_level = SOL_SOCKET;
	head->cmsg_type = SCM_RIGHTS;
	head->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(head), &fd, sizeof(fd));
	if (!fork()) {
		int got;

		close(fd);
		if (recvmsg(pair[0], &msg, 0) != 1)
			_exit(1);
		memcpy(&got, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(got));
		_exit(report(got, 5) != 0);
	}
	if (sendmsg(pair[1], &msg, 0) != 1)
		check("sendmsg", errno);
	reap_all();
	close(fd);
	check("after close", report(100, 6));
	return end();
}

static int many_descriptors(void)
{
	int last = -1;

	for (int i = 0; i < 80; i++)
		last = device();
	check("beyond the range", report(last, 1));
	printf("%d\n", last < 960);
	return end();
}

/* Each program of the chain uses the descriptor it inherited and one of its own. */
static int chain(char **argv)
{
	int depth = atoi(argv[2]);
	int fd = argv[3] ? atoi(argv[3]) : device();
	char next[16], number[16];

	check("inherited", report(fd, depth));
	check("own", report(open(DEVICE, O_RDONLY | O_CLOEXEC), depth));
	if (failures || !depth)
		return end();
	snprintf(next, sizeof(next), "%d", depth - 1);
	snprintf(number, sizeof(number), "%d", fd);
	execl("/proc/self/exe", argv[0], "chain", next, number, (char *)0);
	return 1;
}

static void on_alarm(int number)
{
	(void)number;
}

/*
 * Signals with SA_RESTART, every `interval` us, or (0) whenever somebody sends one: each request is answered,
 * with its own answer.
 */
static int signals(int interval)
{
	struct sigaction action = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };
	struct itimerval timer = { { 0, interval }, { 0, interval } };
	int fd;

	sigaction(SIGALRM, &action, 0);
	setitimer(ITIMER_REAL, &timer, 0);
	fd = device();
	for (uint64_t i = 0; i < 300; i++)
		check("signalled", report(fd, i));
	return end();
}

/* The harness' gate: wait until the device works, let it answer. */
static void wait_until_entered(const char *gate)
{
	char path[4096];

	snprintf(path, sizeof(path), "%s/entered", gate);
	while (access(path, F_OK))
		usleep(1000);
}

static void open_gate(const char *gate)
{
	char path[4096];

	snprintf(path, sizeof(path), "%s/open", gate);
	if (close(creat(path, 0600)))
		check("gate", errno);
}

static volatile int answered;

static void *slow(void *fd)
{
	check("slow", report(*(int *)fd, 1));
	answered = 1;
	return 0;
}

/* While one thread waits for the device, another one uses paths. */
static int aside(const char *gate)
{
	int fd = device();
	pthread_t thread;
	struct stat st;

	pthread_create(&thread, 0, slow, &fd);
	wait_until_entered(gate);
	for (int i = 0; i < 100; i++)
		check("stat", stat(DEVICE, &st) ? errno : 0);
	printf("answered first: %d\n", answered);
	open_gate(gate);
	pthread_join(thread, 0);
	return end();
}

/* The parent's exit must not end the service: the daemon asks when it has been adopted. */
static int daemonised(const char *result)
{
	int ready[2];
	pid_t first = getpid(), parent;
	FILE *file;

	if (pipe(ready))
		return 1;
	if (fork())
		return read(ready[0], &parent, 1) == 1 ? 3 : 1;
	parent = getpid();
	if (fork())
		_exit(0);
	setsid();
	while (getppid() == parent)
		usleep(1000);
	if (write(ready[1], "", 1) != 1)
		return 1;
	while (!kill(first, 0)) /* until the first process has ended and was waited for */
		usleep(1000);
	file = fopen(result, "w");
	fprintf(file, "%d\n", report(device(), 1));
	fclose(file);
	return 0;
}

static void on_term(int number)
{
	char text[] = "got 00\n";

	text[4] += number / 10;
	text[5] += number % 10;
	_exit(write(1, text, 7) == 7 ? 33 : 1);
}

/* Says "ready" and waits for a signal that the supervisor passes on. */
static void waits(void)
{
	signal(SIGTERM, on_term);
	signal(SIGHUP, on_term);
	if (write(1, "ready\n", 6) != 6)
		_exit(1);
	for (;;)
		pause();
}

/* Is killed by another process while the device works. */
static int killed(const char *gate)
{
	int fd = device();
	pid_t victim = getpid();

	if (!fork()) {
		wait_until_entered(gate);
		kill(victim, SIGKILL);
		open_gate(gate);
		_exit(0);
	}
	report(fd, 1);
	return 0;
}

static int dispositions(void)
{
	static const int numbers[] = { SIGINT, SIGQUIT, SIGTERM, SIGHUP, SIGCHLD, SIGPIPE };
	struct sigaction action;
	sigset_t blocked;

	sigprocmask(SIG_SETMASK, 0, &blocked);
	for (size_t i = 0; i < sizeof(numbers) / sizeof(*numbers); i++) {
		sigaction(numbers[i], 0, &action);
		printf("%d %d\n", action.sa_handler == SIG_DFL, sigismember(&blocked, numbers[i]));
	}
	return 0;
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";

	if (!strcmp(mode, "threads"))
		return threads();
	if (!strcmp(mode, "children"))
		return children();
	if (!strcmp(mode, "duplicates"))
		return duplicates();
	if (!strcmp(mode, "many"))
		return many_descriptors();
	if (!strcmp(mode, "chain"))
		return chain(argv);
	if (!strcmp(mode, "signals"))
		return signals(300);
	if (!strcmp(mode, "called away"))
		return signals(0);
	if (!strcmp(mode, "aside"))
		return aside(argv[2]);
	if (!strcmp(mode, "daemon"))
		return daemonised(argv[2]);
	if (!strcmp(mode, "waits"))
		waits();
	if (!strcmp(mode, "killed"))
		return killed(argv[2]);
	if (!strcmp(mode, "dispositions"))
		return dispositions();
	return 2;
}
