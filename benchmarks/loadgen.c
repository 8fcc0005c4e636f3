/* The load generator of the benchmarks: one service that does what each connection's first 16 bytes ask, and the clients that ask.
 *
 * A request is 16 bytes: an operation letter, a flag, six zero bytes, a count (u64, host order). Then, by operation:
 *   E  echo everything                          S  the service sends `count` bytes of the pattern, then ends
 *   R  48 more bytes in, 256 bytes out, close   D  the service takes `count` bytes of the pattern, answers one byte, then ends
 * Flag 1: the service keeps its own send buffer small, so that a crowd which never reads fills the peer's memory, not the service's.
 * The pattern has a prime period, so bytes that are lost, repeated or out of order do not fit any more; every byte is compared.
 * Each client prints one JSON object. Everything is on 127.0.0.1.
 */
#define _GNU_SOURCE
#include <pthread.h>

#define PROGRAM "loadgen"
#include "net.h"

enum { HEAD = 16, REQUEST = 64, ANSWER = 256, PING = 64, CHUNK = 262144, PERIOD = 65521, TURNS = 4, EVENTS = 256, OPENING = 64, SMALL = 32768 };

static uint8_t pattern[PERIOD + CHUNK];
static volatile sig_atomic_t stopping;

static void on_term(int sig) {
    (void)sig;
    stopping = 1;
}

static void prepare(void) {
    fill_noise(pattern, PERIOD);
    for (int i = PERIOD; i < PERIOD + CHUNK; i++) pattern[i] = pattern[i - PERIOD];
    raise_file_limit();
    signal(SIGPIPE, SIG_IGN);
    struct sigaction term = {.sa_handler = on_term};
    sigaction(SIGTERM, &term, NULL);
}

static int fits(const uint8_t *bytes, size_t n, uint64_t offset) { return memcmp(bytes, pattern + offset % PERIOD, n) == 0; }

static void request(uint8_t *head, char op, uint64_t count) {
    memset(head, 0, HEAD);
    head[0] = op;
    memcpy(head + 8, &count, 8);
}

/* ---- the service: thread 0 accepts and answers what is small, thread 1 moves bulk, so that an echo never queues behind bulk in here */

struct served {
    int fd, ep, got;
    char op; /* 0: head not complete; 'w': wait for the peer's end */
    uint64_t count, done;
    uint8_t head[REQUEST];
};

static int eps[2], listener = -1;

static int end_after_peer(struct served *c) {
    shutdown(c->fd, SHUT_WR);
    c->op = 'w';
    watch(c->ep, EPOLL_CTL_MOD, c->fd, EPOLLIN, c);
    return 1;
}

static int take_bulk(struct served *c, const uint8_t *bytes, size_t n) {
    int good = fits(bytes, n, c->done);
    c->done += n;
    if (good && c->done < c->count) return 1;
    write_all(c->fd, (const uint8_t *)(good && c->done == c->count ? "K" : "X"), 1);
    return end_after_peer(c);
}

static void move_to_bulk(struct served *c) {
    epoll_ctl(eps[0], EPOLL_CTL_DEL, c->fd, NULL);
    c->ep = eps[1];
    watch(c->ep, EPOLL_CTL_ADD, c->fd, c->op == 'S' ? EPOLLOUT : EPOLLIN, c);
}

static int take_head(struct served *c) {
    ssize_t n = recv(c->fd, c->head + c->got, REQUEST - c->got, 0);
    if (n < 0 && errno == EAGAIN) return 1;
    if (n <= 0) return 0;
    c->got += n;
    if (c->got < HEAD || (c->head[0] == 'R' && c->got < REQUEST)) return 1;
    c->op = c->head[0];
    memcpy(&c->count, c->head + 8, 8);
    int extra = c->got - HEAD, small = SMALL;
    if (c->head[1]) setsockopt(c->fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
    switch (c->op) {
    case 'R': write_all(c->fd, pattern, ANSWER); return 0;
    case 'E': return write_all(c->fd, c->head + HEAD, extra) == 0;
    case 'S': move_to_bulk(c); return 1;
    case 'D':
        if (extra && !fits(c->head + HEAD, extra, 0)) return 0;
        c->done = extra;
        move_to_bulk(c);
        return 1;
    default: return 0;
    }
}

/* One turn of one connection; 0 when it is over. */
static int serve_turn(struct served *c, uint8_t *buffer) {
    if (!c->op) return take_head(c);
    for (int turn = 0; turn < TURNS; turn++) {
        if (c->op == 'S') {
            uint64_t left = c->count - c->done;
            if (!left) return end_after_peer(c);
            ssize_t n = send(c->fd, pattern + c->done % PERIOD, left < CHUNK ? left : CHUNK, MSG_NOSIGNAL);
            if (n < 0) return errno == EAGAIN;
            c->done += n;
            continue;
        }
        ssize_t n = recv(c->fd, buffer, CHUNK, 0);
        if (n < 0) return errno == EAGAIN;
        if (n == 0) return 0;
        if (c->op == 'E') return write_all(c->fd, buffer, n) == 0;
        if (c->op == 'D') take_bulk(c, buffer, n);
    }
    return 1;
}

static void *serve_loop(void *arg) {
    int ep = *(int *)arg;
    struct epoll_event ready[EVENTS];
    uint8_t *buffer = malloc(CHUNK);
    while (!stopping) {
        int n = epoll_wait(ep, ready, EVENTS, 1000);
        for (int i = 0; i < n; i++) {
            struct served *c = ready[i].data.ptr;
            if (c) { /* the listener, in eps[0] only, has no owner */
                if (!serve_turn(c, buffer)) close(c->fd), free(c);
                continue;
            }
            for (int k = 0; k < 64; k++) {
                int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                if (fd < 0) break;
                nodelay(fd);
                struct served *s = calloc(1, sizeof *s);
                s->fd = fd, s->ep = ep;
                watch(ep, EPOLL_CTL_ADD, fd, EPOLLIN, s);
            }
        }
    }
    return NULL;
}

static int serve(int port) {
    listener = listen_on(port, 4096);
    eps[0] = epoll_create1(EPOLL_CLOEXEC), eps[1] = epoll_create1(EPOLL_CLOEXEC);
    watch(eps[0], EPOLL_CTL_ADD, listener, EPOLLIN, NULL);
    pthread_t bulk;
    if (pthread_create(&bulk, NULL, serve_loop, &eps[1])) die("thread");
    puts("ready"), fflush(stdout);
    serve_loop(&eps[0]);
    return 0;
}

/* ---- bulk: `n` streams of `bytes` each, or as much as goes in `seconds` */

struct moved {
    int fd;
    uint64_t done;
};

static int bulk(int port, char direction, int n, uint64_t bytes, double seconds) {
    struct moved *all = calloc(n, sizeof *all);
    uint8_t *buffer = malloc(CHUNK), head[HEAD];
    int ep = epoll_create1(EPOLL_CLOEXEC), up = direction == 'u', open = 0, ok = 0, reset = 0, cut_short = 0, corrupt = 0;
    request(head, up ? 'D' : 'S', bytes);
    double start = now_s();
    for (int i = 0; i < n; i++) {
        struct moved *m = &all[i];
        if ((m->fd = dial(port, 0)) < 0 || write_all(m->fd, head, HEAD) < 0) {
            reset++;
            continue;
        }
        watch(ep, EPOLL_CTL_ADD, m->fd, up ? EPOLLOUT : EPOLLIN, m);
        open++;
    }
    struct epoll_event ready[EVENTS];
    while (open && !stopping && (seconds <= 0 || now_s() - start < seconds)) {
        int events = epoll_wait(ep, ready, EVENTS, 100);
        for (int i = 0; i < events; i++) {
            struct moved *m = ready[i].data.ptr;
            int over = 0;
            for (int turn = 0; turn < TURNS && !over; turn++) {
                uint64_t left = bytes - m->done;
                int sending = up && left;
                ssize_t got = sending ? send(m->fd, pattern + m->done % PERIOD, left < CHUNK ? left : CHUNK, MSG_NOSIGNAL | MSG_DONTWAIT)
                                      : recv(m->fd, buffer, CHUNK, MSG_DONTWAIT);
                if (got < 0 && errno == EAGAIN) break;
                if (got < 0) {
                    reset++, over = 1;
                } else if (sending) {
                    if ((m->done += got) == bytes) watch(ep, EPOLL_CTL_MOD, m->fd, EPOLLIN, m);
                } else if (up) {
                    if (got == 1 && buffer[0] == 'K') ok++;
                    else if (got == 0) cut_short++;
                    else corrupt++;
                    over = 1;
                } else if (got == 0) {
                    if (left) cut_short++;
                    else ok++;
                    over = 1;
                } else if (!fits(buffer, got, m->done)) {
                    corrupt++, over = 1;
                } else {
                    m->done += got;
                }
            }
            if (over) close(m->fd), m->fd = -1, open--;
        }
    }
    double took = now_s() - start;
    uint64_t sum = 0, least = UINT64_MAX;
    for (int i = 0; i < n; i++) sum += all[i].done, least = all[i].done < least ? all[i].done : least;
    printf("{\"bytes\":%llu,\"seconds\":%.6f,\"ok\":%d,\"open\":%d,\"reset\":%d,\"short\":%d,\"corrupt\":%d,\"least_bytes\":%llu}\n",
           (unsigned long long)sum, took, ok, open, reset, cut_short, corrupt, (unsigned long long)least);
    return 0;
}

/* ---- latency */

static int echo(int port, double seconds) {
    enum { MOST = 2000000, WARM = 100 };
    double *took = malloc(MOST * sizeof *took);
    uint8_t message[HEAD + PING], back[PING];
    int fd = dial(port, 0), n = 0, rounds = 0;
    if (fd < 0) die("connect");
    struct timeval patience = {20, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    request(message, 'E', 0);
    memcpy(message + HEAD, pattern, PING);
    if (write_all(fd, message, HEAD) < 0) die("send");
    double start = now_s(), t = start;
    while (!stopping && n < MOST && (t - start < seconds || n < 20)) {
        if (write_all(fd, message + HEAD, PING) < 0) die("send");
        for (int got = 0; got < PING;) {
            ssize_t r = recv(fd, back + got, PING - got, 0);
            if (r <= 0) die("echo lost");
            got += r;
        }
        if (!fits(back, PING, 0)) die("echo differs");
        double after = now_s();
        if (++rounds > WARM || after - start > 1) took[n++] = after - t;
        t = after;
    }
    qsort(took, n, sizeof *took, by_value);
    printf("{\"count\":%d,\"p50_us\":%.2f,\"p99_us\":%.2f,\"max_us\":%.2f}\n", n, rank_us(took, n, 0.5), rank_us(took, n, 0.99), rank_us(took, n, 1));
    return 0;
}

/* ---- connections: connect, 64 bytes out, 256 bytes and the end in, close; `wide` at a time, or with a `pace` so many a second, evenly,
 * however long each takes; then `wide` is how many may be under way */

struct asked {
    int fd, got, sent;
    double since;
};

static int ask(int ep, int port, struct asked *a) {
    if ((a->fd = dial(port, SOCK_NONBLOCK)) < 0) return -1;
    a->got = a->sent = 0, a->since = now_s();
    watch(ep, EPOLL_CTL_ADD, a->fd, EPOLLOUT, a);
    return 0;
}

static int connections(int port, int wide, double pace, double seconds) {
    enum { MOST = 2000000 };
    struct asked *all = calloc(wide, sizeof *all);
    double *took = malloc(MOST * sizeof *took), start = now_s(), last = start;
    uint8_t message[REQUEST] = {0}, answer[ANSWER + 1];
    int ep = epoll_create1(EPOLL_CLOEXEC), open = 0, done = 0, failed = 0, begun = 0;
    request(message, 'R', 0);
    for (int i = 0; i < wide; i++) {
        all[i].fd = -1;
        if (!pace) ask(ep, port, &all[i]) < 0 ? failed++ : open++;
    }
    struct epoll_event ready[EVENTS];
    while ((open || (pace && last - start < seconds)) && last - start < seconds + 5) {
        double rest_s = pace && last - start < seconds ? begun / pace - (last - start) : 0.2;
        int events = epoll_wait(ep, ready, EVENTS, rest_s < 0 ? 0 : (int)(rest_s * 1e3) + 1);
        last = now_s();
        for (; pace && !stopping && last - start < seconds && begun < (last - start) * pace; begun++) {
            int i = 0;
            while (i < wide && all[i].fd >= 0) i++;
            i < wide && ask(ep, port, &all[i]) == 0 ? open++ : failed++;
        }
        for (int i = 0; i < events; i++) {
            struct asked *a = ready[i].data.ptr;
            if (!a->sent) {
                a->sent = 1;
                if (write_all(a->fd, message, REQUEST) == 0) {
                    watch(ep, EPOLL_CTL_MOD, a->fd, EPOLLIN, a);
                    continue;
                }
                a->got = -1;
            } else {
                ssize_t n = recv(a->fd, answer + a->got, sizeof answer - a->got, 0);
                if (n < 0 && errno == EAGAIN) continue;
                if (n > 0 && a->got + n <= ANSWER) {
                    a->got += n;
                    continue;
                }
                if (n != 0) a->got = -1;
            }
            double t = now_s();
            if (a->got == ANSWER && fits(answer, ANSWER, 0)) {
                if (done < MOST) took[done++] = t - a->since;
            } else {
                failed++;
            }
            close(a->fd), a->fd = -1, open--;
            if (!pace && !stopping && t - start < seconds && ask(ep, port, a) == 0) open++;
        }
    }
    qsort(took, done, sizeof *took, by_value);
    printf("{\"done\":%d,\"failed\":%d,\"stuck\":%d,\"seconds\":%.6f,\"p50_us\":%.1f,\"p99_us\":%.1f}\n", done, failed, open, last - start,
           rank_us(took, done, 0.5), rank_us(took, done, 0.99));
    return 0;
}

/* ---- crowds that only hold: idle ones (each echoed once) and ones that asked for bytes they never read */

static int crowd(int port, int n, uint64_t unread_bytes) {
    int *fds = malloc(n * sizeof *fds), opened = 0, failed = 0, lost = 0;
    uint8_t message[HEAD + PING], back[PING];
    request(message, unread_bytes ? 'S' : 'E', unread_bytes);
    message[1] = unread_bytes > 0;
    memcpy(message + HEAD, pattern, PING);
    for (int from = 0; from < n && !stopping; from += OPENING) {
        int to = from + OPENING < n ? from + OPENING : n;
        for (int i = from; i < to; i++) {
            fds[i] = dial(port, 0);
            if (fds[i] >= 0 && write_all(fds[i], message, unread_bytes ? HEAD : HEAD + PING) < 0) close(fds[i]), fds[i] = -1;
        }
        for (int i = from; i < to; i++) {
            struct timeval patience = {10, 0};
            if (fds[i] >= 0) setsockopt(fds[i], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
            if (fds[i] >= 0 && !unread_bytes && recv(fds[i], back, PING, MSG_WAITALL) != PING) close(fds[i]), fds[i] = -1;
            fds[i] >= 0 ? opened++ : failed++;
        }
    }
    printf("{\"open\":%d,\"failed\":%d}\n", opened, failed), fflush(stdout);
    while (!stopping && read(0, back, sizeof back) > 0) continue;
    for (int i = 0; i < n; i++) {
        struct pollfd p = {fds[i], POLLRDHUP, 0};
        if (fds[i] >= 0 && poll(&p, 1, 0) > 0) lost++;
    }
    printf("{\"lost\":%d}\n", lost);
    return 0;
}

int main(int argc, char **argv) {
    prepare();
    if (argc < 4) {
        fprintf(stderr, "usage: loadgen LIMIT_S serve PORT | bulk PORT d|u N BYTES SECONDS | echo PORT SECONDS | conn PORT N SECONDS"
                        " | pace PORT N A_SECOND SECONDS | idle PORT N | stall PORT N BYTES\n");
        return 2;
    }
    alarm(atoi(argv[1]));
    const char *mode = argv[2];
    int port = atoi(argv[3]);
    if (!strcmp(mode, "serve")) return serve(port);
    if (!strcmp(mode, "bulk") && argc == 8) return bulk(port, argv[4][0], atoi(argv[5]), strtoull(argv[6], 0, 10), atof(argv[7]));
    if (!strcmp(mode, "echo") && argc == 5) return echo(port, atof(argv[4]));
    if (!strcmp(mode, "conn") && argc == 6) return connections(port, atoi(argv[4]), 0, atof(argv[5]));
    if (!strcmp(mode, "pace") && argc == 7) return connections(port, atoi(argv[4]), atof(argv[5]), atof(argv[6]));
    if (!strcmp(mode, "idle") && argc == 5) return crowd(port, atoi(argv[4]), 0);
    if (!strcmp(mode, "stall") && argc == 6) return crowd(port, atoi(argv[4]), strtoull(argv[5], 0, 10));
    return 2;
}
