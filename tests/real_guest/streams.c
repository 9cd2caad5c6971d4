// A guest's program that uses what is not a disk: ports to the host, a network, and a folder of the host's.
//
//   streams TO-HOST FROM-HOST SERVER PORT TAG
//
// Static. Writes 300,000 bytes to the first port, which is /dev/vportNpM by its name in /sys; says back what a line of the
// second says, in capitals; gives eth0 the address 10.0.2.15 and writes what an HTTP server answers to standard output; mounts
// the folder, and makes the file "back" in it of the file "there", in capitals; then writes all of standard input.

#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void nap(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
}

// Open a port by its name; it may come a moment after the device.
static int open_port(const char *wanted)
{
    for (int tries = 0; tries < 500; tries++, nap()) {
        DIR *ports = opendir("/sys/class/virtio-ports");
        struct dirent *port;
        while (ports && (port = readdir(ports))) {
            char path[600], name[256] = "";
            snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", port->d_name);
            FILE *file = fopen(path, "r");
            if (!file)
                continue;
            int found = fscanf(file, "%255s", name) == 1 && !strcmp(name, wanted);
            fclose(file);
            if (found) {
                snprintf(path, sizeof path, "/dev/%s", port->d_name);
                int opened = open(path, O_RDWR);
                if (opened >= 0) {
                    closedir(ports);
                    return opened;
                }
            }
        }
        if (ports)
            closedir(ports);
    }
    fail(wanted);
    return -1;
}

static void write_all(int to, const char *data, size_t size)
{
    while (size) {
        ssize_t done = write(to, data, size);
        if (done <= 0)
            fail("write");
        data += done;
        size -= done;
    }
}

static void many_bytes(const char *name)
{
    static char data[300000];
    for (size_t at = 0; at < sizeof data; at++)
        data[at] = at % 251;
    int port = open_port(name);
    write_all(port, data, sizeof data);
    close(port);
}

static void capitals(const char *name)
{
    char line[256];
    size_t size = 0;
    int port = open_port(name);
    do {
        ssize_t got = read(port, line + size, sizeof line - size);
        if (got <= 0)
            fail("read");
        size += got;
    } while (size < sizeof line && line[size - 1] != '\n');
    for (size_t at = 0; at < size; at++)
        line[at] = toupper((unsigned char)line[at]);
    write_all(port, line, size);
    close(port);
}

static void input(void)
{
    char data[3000];
    ssize_t got;
    while ((got = read(STDIN_FILENO, data, sizeof data)) > 0)
        write_all(STDOUT_FILENO, data, got);
    if (got < 0)
        fail("standard input");
}

static void set(int any, unsigned long call, struct ifreq *request, const char *address)
{
    struct sockaddr_in *where = (struct sockaddr_in *)&request->ifr_addr;
    if (address) {
        memset(where, 0, sizeof *where);
        where->sin_family = AF_INET;
        inet_aton(address, &where->sin_addr);
    } else {
        request->ifr_flags = IFF_UP | IFF_RUNNING;
    }
    if (ioctl(any, call, request) < 0)
        fail("eth0");
}

static void network(const char *server, const char *port)
{
    struct ifreq request = {.ifr_name = "eth0"};
    int any = socket(AF_INET, SOCK_DGRAM, 0);
    set(any, SIOCSIFADDR, &request, "10.0.2.15");
    set(any, SIOCSIFNETMASK, &request, "255.255.255.0");
    set(any, SIOCSIFFLAGS, &request, NULL);
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    inet_aton(server, &where.sin_addr);
    int peer = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(peer, (struct sockaddr *)&where, sizeof where) < 0)
        fail("connect");
    static const char question[] = "GET /page HTTP/1.0\r\n\r\n";
    write_all(peer, question, sizeof question - 1);
    char data[4096];
    ssize_t got;
    while ((got = read(peer, data, sizeof data)) > 0)
        write_all(STDOUT_FILENO, data, got);
    close(peer);
    close(any);
}

static void folder(const char *tag)
{
    static char data[1 << 20];
    if (mkdir("/mnt", 0755) < 0 || mount(tag, "/mnt", "virtiofs", 0, NULL) < 0)
        fail(tag);
    int there = open("/mnt/there", O_RDONLY), back = open("/mnt/back", O_WRONLY | O_CREAT | O_EXCL, 0644);
    if (there < 0 || back < 0)
        fail("files");
    ssize_t got;
    while ((got = read(there, data, sizeof data)) > 0) {
        for (ssize_t at = 0; at < got; at++)
            data[at] = toupper((unsigned char)data[at]);
        write_all(back, data, got);
    }
    if (got < 0 || fsync(back) < 0 || close(back) < 0 || close(there) < 0 || umount("/mnt") < 0)
        fail("folder");
}

int main(int count, char **words)
{
    if (count != 6)
        return 2;
    many_bytes(words[1]);
    capitals(words[2]);
    network(words[3], words[4]);
    folder(words[5]);
    input();
    return 0;
}
