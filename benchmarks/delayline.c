/* A long line in user space: TCP connections are carried on to another port, at most so many bits a second each way, each byte so many ms later.
 *
 *     delayline LIMIT_S PORT TARGET_PORT DELAY_MS MBIT_PER_S
 *
 * The rate is shared by all connections of one direction, as on a real line. Bytes that come faster wait where they are, beyond QUEUE_S of them
 * (a router's buffer). Both ends speak TCP with this program, so the kernel's own windows and retransmissions are not what is measured: the
 * windows of what runs over the line are. A FIN travels like a byte; a reset is passed on at once. Everything is on 127.0.0.1.
 */
#define _GNU_SOURCE
#define PROGRAM "delayline"
#include "net.h"

enum { CHUNK = 65536, CHUNKS = 16384, EVENTS = 64, BACKLOG = 512 };
#define QUEUE_S 0.005
#define LATE_S 0.05 /* where bytes have waited since, the line has not been idle: this program was late, by that much at most */

struct chunk {
    uint64_t end; /* of its bytes in the pipe's count */
    double due;
};

struct pipe { /* one direction of one connection */
    int from, to, readable, writable, ended, closed;
    double *lane; /* when this direction of the line is free again */
    uint64_t in, out, first, last;
    struct chunk *chunks;
    uint8_t *ring;
};

struct joined {
    struct pipe way[2];
    struct joined *next;
    int broken;
};

static double delay_s, bytes_per_s, lanes[2];
static size_t ring_bytes;
static struct joined *all;

static void watch_side(int ep, int fd, struct joined *j, int side) {
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.u64 = (uintptr_t)j | side};
    nodelay(fd);
    if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e) < 0) die("epoll_ctl");
}

static void join_up(int ep, int near, int target) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(target), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int far = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (far < 0 || connect(far, (void *)&to, sizeof to) < 0) {
        if (far >= 0) close(far);
        close(near);
        return;
    }
    struct joined *j = calloc(1, sizeof *j);
    for (int side = 0; side < 2; side++) {
        struct pipe *p = &j->way[side];
        p->from = side ? far : near, p->to = side ? near : far, p->lane = &lanes[side];
        p->ring = malloc(ring_bytes), p->chunks = malloc(CHUNKS * sizeof *p->chunks);
    }
    j->next = all, all = j;
    watch_side(ep, near, j, 0), watch_side(ep, far, j, 1);
}

static void end(struct joined *j, int in_order) {
    struct linger abort = {!in_order, 0};
    for (int side = 0; side < 2; side++) {
        struct pipe *p = &j->way[side];
        setsockopt(p->from, SOL_SOCKET, SO_LINGER, &abort, sizeof abort);
        close(p->from), free(p->ring), free(p->chunks);
    }
}

/* Takes one share of what the line has room for now: how much, or -1 when the connection is broken. */
static ssize_t take(struct pipe *p, double now) {
    size_t at = p->in % ring_bytes, room = ring_bytes - (p->in - p->out);
    if (room > ring_bytes - at) room = ring_bytes - at;
    if (room > CHUNK) room = CHUNK;
    if (!room || !p->readable || p->ended || *p->lane - now >= QUEUE_S || p->last - p->first == CHUNKS) return 0;
    ssize_t n = recv(p->from, p->ring + at, room, MSG_DONTWAIT);
    if (n < 0 && errno != EAGAIN) return -1;
    if (n < 0) return p->readable = 0;
    if (n == 0) p->ended = 1;
    p->in += n;
    *p->lane = (*p->lane > now - LATE_S ? *p->lane : now - LATE_S) + n / bytes_per_s;
    p->chunks[p->last++ % CHUNKS] = (struct chunk){p->in, *p->lane + delay_s};
    return n;
}

/* Gives what is due: 0 when the connection is broken. */
static int give(struct pipe *p, double now) {
    while (p->writable && p->first < p->last && p->chunks[p->first % CHUNKS].due <= now) {
        uint64_t due = p->chunks[p->first % CHUNKS].end;
        while (p->first + 1 < p->last && p->chunks[(p->first + 1) % CHUNKS].due <= now) due = p->chunks[++p->first % CHUNKS].end;
        while (p->out < due) {
            size_t at = p->out % ring_bytes, n = due - p->out;
            if (n > ring_bytes - at) n = ring_bytes - at;
            ssize_t sent = send(p->to, p->ring + at, n, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (sent < 0 && errno != EAGAIN) return 0;
            if (sent < 0) {
                p->writable = 0;
                return 1;
            }
            p->out += sent;
        }
        p->first++;
    }
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 6) {
        fprintf(stderr, "usage: delayline LIMIT_S PORT TARGET_PORT DELAY_MS MBIT_PER_S\n");
        return 2;
    }
    alarm(atoi(argv[1]));
    delay_s = atof(argv[4]) / 1e3, bytes_per_s = atof(argv[5]) * 1e6 / 8;
    ring_bytes = bytes_per_s * (delay_s + QUEUE_S) * 1.25 + 4 * CHUNK;
    int fd = listen_on(atoi(argv[2]), BACKLOG), ep = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event ready[EVENTS];
    watch(ep, EPOLL_CTL_ADD, fd, EPOLLIN, NULL);
    puts("ready"), fflush(stdout);
    for (int busy = 0, waiting[2] = {0, 0};;) {
        int n = epoll_wait(ep, ready, EVENTS, busy ? 1 : -1);
        for (int i = 0; i < n; i++) {
            struct joined *j = (void *)(uintptr_t)(ready[i].data.u64 & ~(uint64_t)1);
            if (!j) {
                for (int near; (near = accept4(fd, NULL, NULL, SOCK_CLOEXEC)) >= 0;) join_up(ep, near, atoi(argv[3]));
                continue;
            }
            int side = ready[i].data.u64 & 1;
            if (ready[i].events & ~EPOLLOUT) j->way[side].readable = 1;
            if (ready[i].events & EPOLLOUT) j->way[!side].writable = 1;
        }
        double now = now_s();
        ssize_t taken = 1;
        for (int side = 0; side < 2; side++)
            if (!waiting[side] && lanes[side] < now) lanes[side] = now;
        for (struct joined *j = all; j; j = j->next)
            for (int side = 0; side < 2; side++) j->broken |= !give(&j->way[side], now);
        while (taken) { /* share by share, so that nobody has the line to himself */
            taken = 0;
            for (struct joined *j = all; j; j = j->next)
                for (int side = 0; side < 2 && !j->broken; side++) {
                    ssize_t count = take(&j->way[side], now);
                    if (count < 0) j->broken = 1;
                    else taken += count;
                }
        }
        busy = waiting[0] = waiting[1] = 0;
        for (struct joined **link = &all; *link;) {
            struct joined *j = *link;
            for (int side = 0; side < 2; side++) {
                struct pipe *p = &j->way[side];
                if (p->ended && !p->closed && p->first == p->last) p->closed = 1, shutdown(p->to, SHUT_WR);
                waiting[side] |= p->readable && !p->ended && p->in - p->out < ring_bytes;
                busy |= p->first < p->last || (p->readable && !p->ended);
            }
            if (j->broken || (j->way[0].closed && j->way[1].closed)) {
                end(j, !j->broken);
                *link = j->next, free(j);
            } else {
                link = &j->next;
            }
        }
        struct joined **tail = &all;
        while (*tail) tail = &(*tail)->next;
        if (all && all->next) *tail = all, all = all->next, (*tail)->next = NULL; /* another one first next time */
    }
}
