/* The load generator of the web's benchmarks: an HTTP/1.1 service, and the clients that ask it. Everything is on 127.0.0.1.
 *
 * The service:  GET /small       200 with 256 bytes                 GET /bytes/N   200 with N bytes
 *               POST             200 with 2 bytes, after the body    Upgrade        101, then every WebSocket frame of a client comes back
 *               a TLS record     256 bytes and the end: what follows a ClientHello is not what is measured
 * The clients compare what comes back, byte by byte, and print one JSON object.
 */
#define _GNU_SOURCE
#define PROGRAM "webgen"
#include "net.h"

enum { SMALL = 256, PING = 64, FRAME = 6 + PING, ECHO = 2 + PING, CHUNK = 262144, HEAD = 16384, EVENTS = 256, MOST = 4000000 };

static const char ask[] = "GET /small HTTP/1.1\r\nHost: bench.example\r\nUser-Agent: webgen/1\r\nAccept: */*\r\n\r\n";
static const char upgrade[] = "GET /socket HTTP/1.1\r\nHost: bench.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                              "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
static const char switched[] = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                               "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"; /* RFC 6455, 1.3 */
static uint8_t pattern[CHUNK];
static uint8_t small[512];
static int small_bytes;
static double took[MOST];

static int headed(uint8_t *out, uint64_t length) {
    return sprintf((char *)out, "HTTP/1.1 200 OK\r\nServer: webgen\r\nContent-Type: application/octet-stream\r\nContent-Length: %llu\r\n\r\n",
                   (unsigned long long)length);
}

static void prepare(void) {
    fill_noise(pattern, CHUNK);
    small_bytes = headed(small, SMALL);
    memcpy(small + small_bytes, pattern, SMALL);
    small_bytes += SMALL;
    raise_file_limit();
    signal(SIGPIPE, SIG_IGN);
}

/* ---- the service */

struct served {
    int fd, got, framed;
    uint64_t sends, sent, body; /* bytes still to send of /bytes/, sent of it, and still to take of a request's body */
    uint8_t in[HEAD + 1];
};

static int send_more(int ep, struct served *c) {
    for (int turn = 0; turn < 4 && c->sends; turn++) {
        uint64_t at = c->sent % CHUNK, room = CHUNK - at;
        ssize_t n = send(c->fd, pattern + at, c->sends < room ? c->sends : room, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno != EAGAIN) return 0;
        if (n < 0) break;
        c->sends -= n, c->sent += n;
    }
    watch(ep, EPOLL_CTL_MOD, c->fd, c->sends ? EPOLLOUT : EPOLLIN, c);
    return 1;
}

static int answer(int ep, struct served *c, int end) {
    uint8_t head[512];
    c->in[end - 1] = 0;
    char *length = strcasestr((char *)c->in, "\r\ncontent-length:");
    uint64_t wanted = 0;
    if (strcasestr((char *)c->in, "\r\nupgrade: websocket")) {
        c->framed = 1;
        return write_all(c->fd, switched, sizeof switched - 1) == 0;
    }
    if (length && (c->body = strtoull(length + 17, NULL, 10))) return 1;
    if (sscanf((char *)c->in, "GET /bytes/%llu", (unsigned long long *)&wanted) != 1) return write_all(c->fd, small, small_bytes) == 0;
    c->sends = wanted, c->sent = 0;
    return write_all(c->fd, head, headed(head, wanted)) == 0 && send_more(ep, c);
}

static int served_turn(int ep, struct served *c, uint32_t events) {
    static const char done[] = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    if (c->sends) return events & EPOLLOUT ? send_more(ep, c) : 0;
    ssize_t n = recv(c->fd, c->in + c->got, HEAD - c->got, 0);
    if (n <= 0) return n < 0 && errno == EAGAIN;
    c->got += n;
    while (c->got) {
        int used = 0;
        if (c->framed) {
            if (c->got < FRAME) return 1;
            uint8_t out[ECHO] = {c->in[0], PING}; /* masked in, as clients must; plain out, as servers must (RFC 6455, 5.1) */
            for (int i = 0; i < PING; i++) out[2 + i] = c->in[6 + i] ^ c->in[2 + i % 4];
            if (write_all(c->fd, out, ECHO) < 0) return 0;
            used = FRAME;
        } else if (c->body) {
            used = c->body < (uint64_t)c->got ? (int)c->body : c->got;
            c->body -= used;
            if (!c->body && write_all(c->fd, done, sizeof done - 1) < 0) return 0;
        } else if (c->in[0] == 0x16) {
            if (c->got < 5 || c->got < 5 + (c->in[3] << 8 | c->in[4])) return 1;
            write_all(c->fd, pattern, SMALL);
            return 0;
        } else {
            uint8_t *end = memmem(c->in, c->got, "\r\n\r\n", 4);
            if (!end) return c->got < HEAD;
            used = end + 4 - c->in;
            if (!answer(ep, c, used)) return 0;
        }
        memmove(c->in, c->in + used, c->got -= used);
    }
    return 1;
}

static void serve(int port) {
    int listener = listen_on(port, 4096), ep = epoll_create1(EPOLL_CLOEXEC);
    watch(ep, EPOLL_CTL_ADD, listener, EPOLLIN, NULL);
    puts("ready"), fflush(stdout);
    struct epoll_event ready[EVENTS];
    for (;;) {
        int n = epoll_wait(ep, ready, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            struct served *c = ready[i].data.ptr;
            if (c) {
                if (!served_turn(ep, c, ready[i].events)) close(c->fd), free(c);
                continue;
            }
            for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
                nodelay(fd);
                c = calloc(1, sizeof *c);
                c->fd = fd;
                watch(ep, EPOLL_CTL_ADD, fd, EPOLLIN, c);
            }
        }
    }
}

/* ---- clients */

static int report(int n, int failed, double seconds) {
    qsort(took, n, sizeof *took, by_value);
    double p50 = rank_us(took, n, 0.5), p99 = rank_us(took, n, 0.99);
    printf("{\"done\":%d,\"failed\":%d,\"seconds\":%.6f,\"p50_us\":%.2f,\"p99_us\":%.2f}\n", n, failed, seconds, p50, p99);
    return 0;
}

struct asked {
    int fd, got;
    double since;
    uint8_t in[SMALL + 2048];
};

/* Whether a whole answer to /small has come: 1, not yet: 0, or something else: -1. Proxies may add header fields, not bytes. */
static int whole(struct asked *a) {
    uint8_t *end = memmem(a->in, a->got, "\r\n\r\n", 4);
    if (!end) return a->got < (int)sizeof a->in ? 0 : -1;
    int rest = a->got - (end + 4 - a->in);
    if (memcmp(a->in, "HTTP/1.1 200 ", 13) || rest > SMALL) return -1;
    if (rest < SMALL) return 0;
    return memcmp(end + 4, pattern, SMALL) ? -1 : 1;
}

/* The next request; `varied`: with a field that no request had before. */
static int ask_again(int fd, int varied) {
    static unsigned long count;
    char head[512];
    if (!varied) return write_all(fd, ask, sizeof ask - 1);
    int bytes = snprintf(head, sizeof head, "%.*sX-Request: %lu\r\n\r\n", (int)sizeof ask - 3, ask, count++);
    return write_all(fd, head, bytes);
}

/* Requests on `wide` connections that are kept, each sent when the answer before it is whole. */
static int get(int port, int wide, double seconds, int varied) {
    struct asked *all = calloc(wide, sizeof *all);
    int ep = epoll_create1(EPOLL_CLOEXEC), open = 0, done = 0, failed = 0;
    double start = now_s(), last = start;
    for (int i = 0; i < wide; i++) {
        if ((all[i].fd = dial(port, 0)) < 0) die("connect");
        watch(ep, EPOLL_CTL_ADD, all[i].fd, EPOLLIN, &all[i]);
        all[i].since = now_s();
        ask_again(all[i].fd, varied), open++;
    }
    struct epoll_event ready[EVENTS];
    while (open && last - start < seconds + 5) {
        int events = epoll_wait(ep, ready, EVENTS, 200);
        last = now_s();
        for (int i = 0; i < events; i++) {
            struct asked *a = ready[i].data.ptr;
            ssize_t n = recv(a->fd, a->in + a->got, sizeof a->in - a->got, MSG_DONTWAIT);
            if (n < 0 && errno == EAGAIN) continue;
            int is_whole = n <= 0 ? -1 : (a->got += n, whole(a));
            if (!is_whole) continue;
            double t = now_s();
            if (is_whole > 0 && done < MOST) took[done++] = t - a->since;
            if (is_whole < 0) failed++;
            if (is_whole > 0 && t - start < seconds) {
                a->got = 0, a->since = t;
                if (ask_again(a->fd, varied) == 0) continue;
                failed++;
            }
            close(a->fd), open--;
        }
    }
    return report(done, failed + open, last - start);
}

/* One WebSocket: a frame to and fro. */
static int socket_echo(int port, double seconds) {
    uint8_t frame[FRAME] = {0x82, 0x80 | PING, 1, 2, 3, 4}, back[ECHO > sizeof switched ? ECHO : 2048];
    int fd = dial(port, 0), n = 0, rounds = 0, got = 0;
    if (fd < 0) die("connect");
    struct timeval patience = {20, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    for (int i = 0; i < PING; i++) frame[6 + i] = pattern[i] ^ frame[2 + i % 4];
    if (write_all(fd, upgrade, sizeof upgrade - 1) < 0) die("send");
    while (got < 4 || memcmp(back + got - 4, "\r\n\r\n", 4)) {
        if (got == (int)sizeof back || recv(fd, back + got, 1, 0) != 1) die("no 101");
        got++;
    }
    if (memcmp(back, "HTTP/1.1 101", 12)) die("another answer than 101");
    double start = now_s(), t = start;
    while (n < MOST && (t - start < seconds || n < 20)) {
        if (write_all(fd, frame, FRAME) < 0) die("send");
        for (got = 0; got < ECHO;) {
            ssize_t r = recv(fd, back + got, ECHO - got, 0);
            if (r <= 0) die("echo lost");
            got += r;
        }
        if (back[0] != 0x82 || memcmp(back + 2, pattern, PING)) die("echo differs");
        double after = now_s();
        if (++rounds > 100 || after - start > 1) took[n++] = after - t;
        t = after;
    }
    return report(n, 0, t - start);
}

/* Connections that begin with the bytes of a file, `wide` at a time; 256 bytes and the end come back. */
static int hello(int port, int wide, double seconds, const char *path) {
    static uint8_t said[HEAD];
    FILE *file = fopen(path, "rb");
    size_t size = file ? fread(said, 1, sizeof said, file) : 0;
    if (!size) die(path);
    struct asked *all = calloc(wide, sizeof *all);
    int ep = epoll_create1(EPOLL_CLOEXEC), open = 0, done = 0, failed = 0;
    double start = now_s(), last = start;
    for (int i = 0; i < wide; i++) {
        all[i].fd = dial(port, SOCK_NONBLOCK), all[i].got = -1, all[i].since = now_s(), open++;
        watch(ep, EPOLL_CTL_ADD, all[i].fd, EPOLLOUT, &all[i]);
    }
    struct epoll_event ready[EVENTS];
    while (open && last - start < seconds + 5) {
        int events = epoll_wait(ep, ready, EVENTS, 200);
        last = now_s();
        for (int i = 0; i < events; i++) {
            struct asked *a = ready[i].data.ptr;
            if (a->got < 0) {
                a->got = 0;
                if (write_all(a->fd, said, size) == 0) {
                    watch(ep, EPOLL_CTL_MOD, a->fd, EPOLLIN, a);
                    continue;
                }
            } else {
                ssize_t n = recv(a->fd, a->in + a->got, sizeof a->in - a->got, 0);
                if (n < 0 && errno == EAGAIN) continue;
                if (n > 0 && (a->got += n) <= SMALL) continue;
                if (n) a->got = 0;
            }
            double t = now_s();
            if (a->got == SMALL && !memcmp(a->in, pattern, SMALL) && done < MOST) took[done++] = t - a->since;
            else failed++;
            close(a->fd), open--;
            if (t - start < seconds && (a->fd = dial(port, SOCK_NONBLOCK)) >= 0) {
                a->got = -1, a->since = t, open++;
                watch(ep, EPOLL_CTL_ADD, a->fd, EPOLLOUT, a);
            }
        }
    }
    return report(done, failed + open, last - start);
}

int main(int argc, char **argv) {
    prepare();
    if (argc < 4) {
        fprintf(stderr, "usage: webgen LIMIT_S serve PORT | get|vary PORT N SECONDS | socket PORT SECONDS | hello PORT N SECONDS FILE\n");
        return 2;
    }
    alarm(atoi(argv[1]));
    const char *mode = argv[2];
    int port = atoi(argv[3]);
    if (!strcmp(mode, "serve")) serve(port);
    if (!strcmp(mode, "get") && argc == 6) return get(port, atoi(argv[4]), atof(argv[5]), 0);
    if (!strcmp(mode, "vary") && argc == 6) return get(port, atoi(argv[4]), atof(argv[5]), 1);
    if (!strcmp(mode, "socket") && argc == 5) return socket_echo(port, atof(argv[4]));
    if (!strcmp(mode, "hello") && argc == 7) return hello(port, atoi(argv[4]), atof(argv[5]), argv[6]);
    return 2;
}
