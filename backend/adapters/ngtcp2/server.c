/* A small HTTP/3 server on ngtcp2 0.12, GnuTLS and nghttp3 that a QUIC-LB balancer can route to.
 *
 * What another server has to do as this one does is in docs/servers/ngtcp2.md; the places are marked "routable:".
 * One thread, one epoll set. Nothing grows without bound: connections, their streams, and what is remembered of early
 * data have limits.
 */
#define _GNU_SOURCE
#include "quiclb.h"

#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <gnutls/crypto.h>
#include <gnutls/gnutls.h>
#include <netdb.h>
#include <nettle/hmac.h>
#include <nettle/sha2.h>
#include <nghttp3/nghttp3.h>
#include <ngtcp2/ngtcp2.h>
#include <ngtcp2/ngtcp2_crypto.h>
#include <ngtcp2/ngtcp2_crypto_gnutls.h>
#include <search.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_LISTEN = 8,
    MAX_CONNECTIONS = 10000,
    MAX_STREAMS = 100, /* of one connection at a time */
    MAX_TOKEN_KEYS = 8,
    RESETS_PER_SECOND = 200, /* behind a balancer every client has one address, so none per source */
    MAX_SEEN = 65536,        /* early data that is remembered, so that it is accepted once */
    PACKET = 1500,           /* octets; ngtcp2 sends at most 1452 */
    READS = 64,              /* datagrams from one socket before the others have their turn */
    SOCKET_BUFFER = 1 << 20,
    CHUNK = 1 << 16,
    TICKS_PER_SECOND = 20,
    MAX_SECONDS = 3600, /* of one /slow */
    EXIT_USAGE = 2,
};
#define MAX_BYTES (UINT64_C(1) << 34) /* of one /bytes */
#define TOKEN_LIFETIME (30 * NGTCP2_SECONDS)
#define NEVER UINT64_MAX

struct connection;

struct stream {
    struct stream *next;
    struct connection *connection;
    int64_t id;
    char method[16], path[256];
    bool is_answered;
    /* The body: `length` octets of `content` from `sent` on; with `chunk` of octets that count up; or ticks. */
    const uint8_t *content;
    uint64_t length, sent;
    bool counts_up, is_slow;
    uint64_t started;       /* nanoseconds */
    unsigned ticks, ticked; /* of /slow: lines in all, and lines that are due */
    bool has_ended;         /* and its last line too */
    uint64_t received;
    struct sha256_ctx digest;
    char text[1024];
};

struct endpoint {
    int socket;
    struct sockaddr_storage address;
    socklen_t length;
};

struct connection {
    ngtcp2_crypto_conn_ref reference;
    ngtcp2_conn *quic;
    nghttp3_conn *http;
    gnutls_session_t tls;
    ngtcp2_connection_close_error error;
    struct stream *streams;
    uint64_t deadline; /* nanoseconds */
    size_t place;      /* in the heap */
    bool is_closing, is_draining;
    uint8_t *close_packet;
    size_t close_length;
    unsigned heard_since_close;
};

/* Which connection a connection ID belongs to. */
struct route {
    uint8_t length;
    uint8_t cid[NGTCP2_MAX_CIDLEN];
    struct connection *connection;
};

/* Early data that was accepted once. */
struct seen {
    uint8_t length;
    uint8_t key[64];
    time_t until;
};

static struct {
    struct quiclb *quiclb;
    const char *name;
    bool retries;
    uint64_t idle_timeout;
    struct endpoint endpoints[MAX_LISTEN];
    size_t endpoint_count;
    gnutls_certificate_credentials_t credentials;
    gnutls_priority_t priority;
    gnutls_anti_replay_t anti_replay;
    gnutls_datum_t ticket_key;
    uint8_t token_secrets[MAX_TOKEN_KEYS][SHA256_DIGEST_SIZE];
    size_t token_secret_count;
    void *routes;                                 /* a tree of struct route */
    struct connection *heap[MAX_CONNECTIONS + 1]; /* by deadline, from 1 on */
    size_t connection_count;
    void *seen; /* a tree of struct seen */
    struct seen ring[MAX_SEEN];
    size_t ring_first, ring_count;
    double reset_credit;
    uint64_t reset_time;
    uint8_t chunk[CHUNK + 256];
    char *lines; /* "0\n1\n2\n..." */
    uint32_t line_ends[MAX_SECONDS * TICKS_PER_SECOND + 1];
} all;

static uint64_t now(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * NGTCP2_SECONDS + (uint64_t)time.tv_nsec;
}

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("ngtcp2: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}

static void say_mistakes(const struct quiclb_mistakes *mistakes)
{
    for (size_t i = 0; i < mistakes->count; i++)
        say("%s", mistakes->lines[i]);
}

/* Connection IDs to connections: a balanced tree, since clients choose the first ones. */

static int by_cid(const void *one, const void *other)
{
    const struct route *a = one, *b = other;
    return a->length != b->length ? a->length - b->length : memcmp(a->cid, b->cid, a->length);
}

static struct connection *find(const uint8_t *cid, size_t length)
{
    struct route wanted = {.length = (uint8_t)length};
    if (length > sizeof wanted.cid)
        return NULL;
    memcpy(wanted.cid, cid, length);
    struct route **found = tfind(&wanted, &all.routes, by_cid);
    return found ? (*found)->connection : NULL;
}

static bool associate(const uint8_t *cid, size_t length, struct connection *connection)
{
    struct route *route = calloc(1, sizeof *route);
    if (!route)
        return false;
    route->length = (uint8_t)length;
    route->connection = connection;
    memcpy(route->cid, cid, length);
    struct route **found = tsearch(route, &all.routes, by_cid);
    if (!found || *found != route) {
        free(route);
        return false;
    }
    return true;
}

static void dissociate(const uint8_t *cid, size_t length, const struct connection *connection)
{
    struct route wanted = {.length = (uint8_t)length};
    memcpy(wanted.cid, cid, length);
    struct route **found = tfind(&wanted, &all.routes, by_cid);
    if (!found || (*found)->connection != connection)
        return;
    struct route *route = *found;
    tdelete(&wanted, &all.routes, by_cid);
    free(route);
}

/* Connections by deadline: a binary heap. */

static void place(struct connection *connection, size_t at)
{
    all.heap[at] = connection;
    connection->place = at;
}

static void reschedule(struct connection *connection, uint64_t deadline)
{
    size_t at = connection->place;
    connection->deadline = deadline;
    while (at > 1 && all.heap[at / 2]->deadline > deadline) {
        place(all.heap[at / 2], at);
        at /= 2;
    }
    for (size_t child; (child = 2 * at) <= all.connection_count; at = child) {
        if (child < all.connection_count && all.heap[child + 1]->deadline < all.heap[child]->deadline)
            child++;
        if (all.heap[child]->deadline >= deadline)
            break;
        place(all.heap[child], at);
    }
    place(connection, at);
}

static void schedule(struct connection *connection)
{
    place(connection, ++all.connection_count);
    reschedule(connection, NEVER);
}

static void unschedule(struct connection *connection)
{
    struct connection *last = all.heap[all.connection_count--];
    if (last != connection) {
        place(last, connection->place);
        reschedule(last, last->deadline);
    }
}

/* Sending. */

static void send_datagram(const ngtcp2_path *path, const uint8_t *data, size_t length)
{
    const struct endpoint *endpoint = path->user_data;
    /* A datagram that the kernel has no room for is lost, as in any network. */
    (void)!sendto(endpoint->socket, data, length, 0, path->remote.addr, path->remote.addrlen);
}

static void forget(struct connection *connection)
{
    size_t count = ngtcp2_conn_get_num_scid(connection->quic);
    ngtcp2_cid *cids = calloc(count, sizeof *cids);
    if (!cids)
        abort();
    ngtcp2_conn_get_scid(connection->quic, cids);
    for (size_t i = 0; i < count; i++)
        dissociate(cids[i].data, cids[i].datalen, connection);
    free(cids);
    const ngtcp2_cid *initial = ngtcp2_conn_get_client_initial_dcid(connection->quic);
    dissociate(initial->data, initial->datalen, connection);
    unschedule(connection);
    if (connection->http)
        nghttp3_conn_del(connection->http);
    for (struct stream *stream = connection->streams, *next; stream; stream = next) {
        next = stream->next;
        free(stream);
    }
    ngtcp2_conn_del(connection->quic);
    gnutls_deinit(connection->tls);
    free(connection->close_packet);
    free(connection);
}

static void linger(struct connection *connection)
{
    reschedule(connection, now(CLOCK_MONOTONIC) + 3 * ngtcp2_conn_get_pto(connection->quic));
}

/* Sends CONNECTION_CLOSE with the connection's error, and answers with it for a while. */
static void close_connection(struct connection *connection)
{
    ngtcp2_path_storage path;
    ngtcp2_pkt_info info;
    uint8_t packet[PACKET];
    if (connection->is_closing || connection->is_draining)
        return;
    connection->is_closing = true;
    ngtcp2_path_storage_zero(&path);
    ngtcp2_ssize length = ngtcp2_conn_write_connection_close(connection->quic, &path.path, &info, packet, sizeof packet,
                                                             &connection->error, now(CLOCK_MONOTONIC));
    if (length > 0 && (connection->close_packet = malloc((size_t)length))) {
        memcpy(connection->close_packet, packet, (size_t)length);
        connection->close_length = (size_t)length;
        send_datagram(&path.path, packet, (size_t)length);
    }
    linger(connection);
}

static void fail(struct connection *connection, int error)
{
    if (error == NGTCP2_ERR_CRYPTO)
        ngtcp2_connection_close_error_set_transport_error_tls_alert(
            &connection->error, ngtcp2_conn_get_tls_alert(connection->quic), NULL, 0);
    else
        ngtcp2_connection_close_error_set_transport_error_liberr(&connection->error, error, NULL, 0);
    close_connection(connection);
}

static void fail_http(struct connection *connection, int error)
{
    ngtcp2_connection_close_error_set_application_error(&connection->error,
                                                        nghttp3_err_infer_quic_app_error_code(error), NULL, 0);
}

/* When a connection has to be looked at next: when QUIC says so, or when a line of a /slow is due. */
static void wait_for_next(struct connection *connection)
{
    uint64_t deadline = ngtcp2_conn_get_expiry(connection->quic);
    for (const struct stream *stream = connection->streams; stream; stream = stream->next) {
        uint64_t due = stream->started + (uint64_t)stream->ticked * (NGTCP2_SECONDS / TICKS_PER_SECOND);
        if (stream->is_slow && !stream->has_ended && due < deadline)
            deadline = due;
    }
    reschedule(connection, deadline);
}

/* Sends what there is to send, as far as congestion control and pacing allow. */
static void write_packets(struct connection *connection)
{
    ngtcp2_conn *quic = connection->quic;
    ngtcp2_path_storage path;
    ngtcp2_pkt_info info;
    uint8_t packet[PACKET];
    nghttp3_vec vectors[16];
    uint64_t time = now(CLOCK_MONOTONIC);
    size_t most = ngtcp2_conn_get_send_quantum(quic), sent = 0;
    if (connection->is_closing || connection->is_draining)
        return;
    ngtcp2_path_storage_zero(&path);
    while (sent == 0 || sent + ngtcp2_conn_get_max_tx_udp_payload_size(quic) <= most) {
        int64_t stream_id = -1;
        int is_last = 0;
        nghttp3_ssize count = 0;
        ngtcp2_ssize taken = -1;
        if (connection->http && ngtcp2_conn_get_max_data_left(quic) > 0) {
            count = nghttp3_conn_writev_stream(connection->http, &stream_id, &is_last, vectors,
                                               sizeof vectors / sizeof vectors[0]);
            if (count < 0) {
                fail_http(connection, (int)count);
                close_connection(connection);
                return;
            }
        }
        ngtcp2_ssize length = ngtcp2_conn_writev_stream(
            quic, &path.path, &info, packet, sizeof packet, &taken,
            NGTCP2_WRITE_STREAM_FLAG_MORE | (is_last ? NGTCP2_WRITE_STREAM_FLAG_FIN : 0u), stream_id,
            (const ngtcp2_vec *)vectors, (size_t)count, time);
        if (length == NGTCP2_ERR_STREAM_DATA_BLOCKED) {
            nghttp3_conn_block_stream(connection->http, stream_id);
            continue;
        }
        if (length == NGTCP2_ERR_STREAM_SHUT_WR) {
            nghttp3_conn_shutdown_stream_write(connection->http, stream_id);
            continue;
        }
        if (taken >= 0 && nghttp3_conn_add_write_offset(connection->http, stream_id, (size_t)taken) != 0) {
            fail(connection, NGTCP2_ERR_INTERNAL);
            return;
        }
        if (length == NGTCP2_ERR_WRITE_MORE)
            continue;
        if (length < 0) {
            fail(connection, (int)length);
            return;
        }
        if (length == 0)
            break;
        send_datagram(&path.path, packet, (size_t)length);
        sent += (size_t)length;
    }
    ngtcp2_conn_update_pkt_tx_time(quic, time);
    wait_for_next(connection);
}

/* HTTP: resources. */

/* What nghttp3 may send next. What it is given stays where it is until the stream is closed. */
static nghttp3_ssize read_body(nghttp3_conn *http, int64_t id, nghttp3_vec *vectors, size_t count, uint32_t *flags,
                               void *user_data, void *stream_user_data)
{
    static const uint8_t end[] = "end\n";
    struct stream *stream = stream_user_data;
    uint64_t length = 0;
    (void)http, (void)id, (void)user_data;
    if (count == 0)
        return NGHTTP3_ERR_CALLBACK_FAILURE;
    if (stream->is_slow) {
        uint64_t due = stream->ticked ? all.line_ends[stream->ticked - 1] : 0;
        if (stream->sent < due) {
            vectors[0] = (nghttp3_vec){(uint8_t *)all.lines + stream->sent, due - stream->sent};
            stream->sent = due;
            return 1;
        }
        if (!stream->has_ended)
            return NGHTTP3_ERR_WOULDBLOCK;
        vectors[0] = (nghttp3_vec){(uint8_t *)end, sizeof end - 1};
        *flags |= NGHTTP3_DATA_FLAG_EOF;
        return 1;
    }
    length = stream->length - stream->sent;
    if (stream->counts_up && length > CHUNK)
        length = CHUNK;
    vectors[0] = (nghttp3_vec){stream->counts_up ? all.chunk + stream->sent % 256
                                                 : (uint8_t *)stream->content + stream->sent,
                               length};
    stream->sent += length;
    if (stream->sent == stream->length)
        *flags |= NGHTTP3_DATA_FLAG_EOF;
    return length > 0;
}

static nghttp3_nv header(const char *name, const char *value)
{
    return (nghttp3_nv){(uint8_t *)name, (uint8_t *)value, strlen(name), strlen(value), NGHTTP3_NV_FLAG_NONE};
}

static int respond(struct stream *stream, int status, const char *type)
{
    static const nghttp3_data_reader reader = {read_body};
    char code[8];
    snprintf(code, sizeof code, "%d", status);
    nghttp3_nv headers[] = {header(":status", code), header("content-type", type), header("server", "ngtcp2")};
    return nghttp3_conn_submit_response(stream->connection->http, stream->id, headers,
                                        sizeof headers / sizeof headers[0], &reader);
}

static int respond_with_text(struct stream *stream, int status, const char *type, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

static int respond_with_text(struct stream *stream, int status, const char *type, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(stream->text, sizeof stream->text, format, arguments);
    va_end(arguments);
    if (length < 0 || (size_t)length >= sizeof stream->text)
        return -1;
    stream->content = (const uint8_t *)stream->text;
    stream->length = (uint64_t)length;
    return respond(stream, status, type);
}

static void print_address(const ngtcp2_addr *address, char text[80])
{
    char host[64], port[8];
    if (getnameinfo(address->addr, address->addrlen, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV | NI_DGRAM) != 0)
        text[0] = 0;
    else
        snprintf(text, 80, address->addr->sa_family == AF_INET6 ? "[%s]:%s" : "%s:%s", host, port);
}

static void print_hex(const uint8_t *octets, size_t length, char *digits)
{
    digits[0] = 0;
    for (size_t i = 0; i < length; i++)
        snprintf(digits + 2 * i, 3, "%02x", octets[i]);
}

static int whoami(struct stream *stream)
{
    ngtcp2_conn *quic = stream->connection->quic;
    uint8_t server_id[QUICLB_MAX_SERVER_ID];
    char name[65], client[80], id[2 * QUICLB_MAX_SERVER_ID + 1], initial[2 * NGTCP2_MAX_CIDLEN + 1];
    const ngtcp2_cid *dcid = ngtcp2_conn_get_client_initial_dcid(quic);
    quiclb_name(all.quiclb, name);
    print_hex(server_id, quiclb_server_id(all.quiclb, server_id), id);
    print_address(&ngtcp2_conn_get_path(quic)->remote, client);
    print_hex(dcid->data, dcid->datalen, initial);
    return respond_with_text(
        stream, 200, "application/json",
        "{\"name\": \"%s\", \"server_id\": \"%s\", \"connection\": \"%s\", \"client\": \"%s\"}\n",
        all.name ? all.name : name, id, initial, client);
}

/* A number behind a prefix of the path; false if there is something else. */
static bool number_behind(const char *path, const char *prefix, double most, double *number)
{
    size_t length = strlen(prefix);
    if (strncmp(path, prefix, length) != 0 || strspn(path + length, "0123456789.") != strlen(path + length) ||
        !path[length])
        return false;
    char *end;
    *number = strtod(path + length, &end);
    return !*end && *number >= 0 && *number <= most;
}

static int answer(struct stream *stream)
{
    double number;
    bool is_upload = strcmp(stream->path, "/upload") == 0;
    bool is_get = strcmp(stream->method, "GET") == 0;
    if (stream->is_answered)
        return 0;
    stream->is_answered = true;
    if (is_upload && (strcmp(stream->method, "PUT") == 0 || strcmp(stream->method, "POST") == 0)) {
        uint8_t digest[SHA256_DIGEST_SIZE];
        char digits[2 * SHA256_DIGEST_SIZE + 1];
        if (!ngtcp2_conn_get_handshake_completed(stream->connection->quic))
            return respond_with_text(stream, 425, "text/plain", "early data may be replayed\n");
        sha256_digest(&stream->digest, sizeof digest, digest);
        print_hex(digest, sizeof digest, digits);
        return respond_with_text(stream, 200, "application/json", "{\"octets\": %llu, \"sha256\": \"%s\"}\n",
                                 (unsigned long long)stream->received, digits);
    }
    if (!is_get)
        return respond_with_text(stream, 405, "text/plain", "expected GET\n");
    if (strcmp(stream->path, "/") == 0)
        return respond_with_text(stream, 200, "text/plain", "This is ngtcp2, behind quiclb.\n");
    if (strcmp(stream->path, "/whoami") == 0)
        return whoami(stream);
    if (number_behind(stream->path, "/bytes/", (double)MAX_BYTES, &number)) {
        stream->counts_up = true;
        stream->length = (uint64_t)number;
        return respond(stream, 200, "application/octet-stream");
    }
    if (number_behind(stream->path, "/slow/", MAX_SECONDS, &number)) {
        stream->is_slow = true;
        stream->ticks = (unsigned)(number * TICKS_PER_SECOND + 0.5);
        stream->started = now(CLOCK_MONOTONIC);
        return respond(stream, 200, "text/plain");
    }
    if (number_behind(stream->path, "/status/", 599, &number) && number >= 200)
        return respond_with_text(stream, (int)number, "text/plain", "as you wish\n");
    return respond_with_text(stream, 404, "text/plain", "no such resource\n");
}

/* Lets the lines of /slow go that are due. */
static void tick(struct connection *connection)
{
    uint64_t time = now(CLOCK_MONOTONIC);
    for (struct stream *stream = connection->streams; stream; stream = stream->next) {
        if (!stream->is_slow || stream->has_ended)
            continue;
        uint64_t due = (time - stream->started) / (NGTCP2_SECONDS / TICKS_PER_SECOND) + 1;
        unsigned before = stream->ticked;
        stream->has_ended = due > stream->ticks;
        stream->ticked = stream->has_ended ? stream->ticks : (unsigned)due;
        if (stream->ticked > before || stream->has_ended)
            nghttp3_conn_resume_stream(connection->http, stream->id);
    }
}

/* HTTP: nghttp3's callbacks. */

static int on_begin_headers(nghttp3_conn *http, int64_t id, void *user_data, void *stream_user_data)
{
    struct connection *connection = user_data;
    struct stream *stream = calloc(1, sizeof *stream);
    (void)stream_user_data;
    if (!stream)
        return NGHTTP3_ERR_CALLBACK_FAILURE;
    stream->id = id;
    stream->connection = connection;
    stream->next = connection->streams;
    connection->streams = stream;
    sha256_init(&stream->digest);
    return nghttp3_conn_set_stream_user_data(http, id, stream) == 0 ? 0 : NGHTTP3_ERR_CALLBACK_FAILURE;
}

static int on_header(nghttp3_conn *http, int64_t id, int32_t token, nghttp3_rcbuf *name, nghttp3_rcbuf *value,
                     uint8_t flags, void *user_data, void *stream_user_data)
{
    struct stream *stream = stream_user_data;
    nghttp3_vec text = nghttp3_rcbuf_get_buf(value);
    (void)http, (void)id, (void)name, (void)flags, (void)user_data;
    if (!stream)
        return 0;
    if (token == NGHTTP3_QPACK_TOKEN__METHOD && text.len < sizeof stream->method)
        memcpy(stream->method, text.base, text.len);
    else if (token == NGHTTP3_QPACK_TOKEN__PATH && text.len < sizeof stream->path)
        memcpy(stream->path, text.base, text.len);
    return 0;
}

static int on_end_of_request(nghttp3_conn *http, int64_t id, void *user_data, void *stream_user_data)
{
    (void)http, (void)id, (void)user_data;
    return stream_user_data && answer(stream_user_data) != 0 ? NGHTTP3_ERR_CALLBACK_FAILURE : 0;
}

static int consume(struct connection *connection, int64_t id, size_t length)
{
    ngtcp2_conn_extend_max_stream_offset(connection->quic, id, length);
    ngtcp2_conn_extend_max_offset(connection->quic, length);
    return 0;
}

static int on_body(nghttp3_conn *http, int64_t id, const uint8_t *data, size_t length, void *user_data,
                   void *stream_user_data)
{
    struct stream *stream = stream_user_data;
    (void)http;
    if (stream) {
        stream->received += length;
        sha256_update(&stream->digest, length, data);
    }
    return consume(user_data, id, length);
}

static int on_deferred_consume(nghttp3_conn *http, int64_t id, size_t length, void *user_data, void *stream_user_data)
{
    (void)http, (void)stream_user_data;
    return consume(user_data, id, length);
}

static int on_http_stream_close(nghttp3_conn *http, int64_t id, uint64_t code, void *user_data, void *stream_user_data)
{
    struct connection *connection = user_data;
    (void)http, (void)id, (void)code;
    for (struct stream **at = &connection->streams; *at; at = &(*at)->next) {
        if (*at == stream_user_data) {
            struct stream *stream = *at;
            *at = stream->next;
            free(stream);
            break;
        }
    }
    return 0;
}

static int on_http_stop_sending(nghttp3_conn *http, int64_t id, uint64_t code, void *user_data, void *stream_user_data)
{
    (void)http, (void)stream_user_data;
    ngtcp2_conn_shutdown_stream_read(((struct connection *)user_data)->quic, id, code);
    return 0;
}

static int on_http_reset(nghttp3_conn *http, int64_t id, uint64_t code, void *user_data, void *stream_user_data)
{
    (void)http, (void)stream_user_data;
    ngtcp2_conn_shutdown_stream_write(((struct connection *)user_data)->quic, id, code);
    return 0;
}

static bool begin_http(struct connection *connection)
{
    static const nghttp3_callbacks callbacks = {
        .stream_close = on_http_stream_close,
        .recv_data = on_body,
        .deferred_consume = on_deferred_consume,
        .begin_headers = on_begin_headers,
        .recv_header = on_header,
        .end_stream = on_end_of_request,
        .stop_sending = on_http_stop_sending,
        .reset_stream = on_http_reset,
    };
    nghttp3_settings settings;
    int64_t control, encoder, decoder;
    nghttp3_settings_default(&settings);
    bool is_good =
        ngtcp2_conn_open_uni_stream(connection->quic, &control, NULL) == 0 &&
        ngtcp2_conn_open_uni_stream(connection->quic, &encoder, NULL) == 0 &&
        ngtcp2_conn_open_uni_stream(connection->quic, &decoder, NULL) == 0 &&
        nghttp3_conn_server_new(&connection->http, &callbacks, &settings, nghttp3_mem_default(), connection) == 0 &&
        nghttp3_conn_bind_control_stream(connection->http, control) == 0 &&
        nghttp3_conn_bind_qpack_streams(connection->http, encoder, decoder) == 0;
    /* Chromium tells the priority of streams before it opens them. */
    if (is_good)
        nghttp3_conn_set_max_client_streams_bidi(connection->http, MAX_STREAMS);
    return is_good;
}

/* QUIC: ngtcp2's callbacks. */

static void on_random(uint8_t *octets, size_t length, const ngtcp2_rand_ctx *context)
{
    (void)context;
    quiclb_random(octets, length);
}

/* routable: every connection ID after the first, and its stateless reset token. */
static int on_new_connection_id(ngtcp2_conn *quic, ngtcp2_cid *cid, uint8_t *token, size_t length, void *user_data)
{
    (void)quic;
    if (length != quiclb_cid_length(all.quiclb))
        return NGTCP2_ERR_CALLBACK_FAILURE;
    quiclb_new_cid(all.quiclb, cid->data);
    cid->datalen = length;
    quiclb_token_of(all.quiclb, cid->data, length, token);
    return associate(cid->data, length, user_data) ? 0 : NGTCP2_ERR_CALLBACK_FAILURE;
}

static int on_remove_connection_id(ngtcp2_conn *quic, const ngtcp2_cid *cid, void *user_data)
{
    (void)quic;
    dissociate(cid->data, cid->datalen, user_data);
    return 0;
}

static int on_tx_key(ngtcp2_conn *quic, ngtcp2_crypto_level level, void *user_data)
{
    (void)quic;
    return level != NGTCP2_CRYPTO_LEVEL_APPLICATION || begin_http(user_data) ? 0 : NGTCP2_ERR_CALLBACK_FAILURE;
}

static int on_handshake_completed(ngtcp2_conn *quic, void *user_data)
{
    struct connection *connection = user_data;
    const ngtcp2_cid *initial = ngtcp2_conn_get_client_initial_dcid(quic);
    dissociate(initial->data, initial->datalen, connection);
    if (all.ticket_key.data)
        gnutls_session_ticket_send(connection->tls, 1, 0);
    return 0;
}

static int on_stream_data(ngtcp2_conn *quic, uint32_t flags, int64_t id, uint64_t offset, const uint8_t *data,
                          size_t length, void *user_data, void *stream_user_data)
{
    struct connection *connection = user_data;
    (void)quic, (void)offset, (void)stream_user_data;
    if (!connection->http)
        return 0;
    nghttp3_ssize consumed =
        nghttp3_conn_read_stream(connection->http, id, data, length, (flags & NGTCP2_STREAM_DATA_FLAG_FIN) != 0);
    if (consumed < 0) {
        fail_http(connection, (int)consumed);
        return NGTCP2_ERR_CALLBACK_FAILURE;
    }
    return consume(connection, id, (size_t)consumed);
}

static int on_acked(ngtcp2_conn *quic, int64_t id, uint64_t offset, uint64_t length, void *user_data,
                    void *stream_user_data)
{
    struct connection *connection = user_data;
    (void)quic, (void)offset, (void)stream_user_data;
    int error = connection->http ? nghttp3_conn_add_ack_offset(connection->http, id, length) : 0;
    return error == 0 || error == NGHTTP3_ERR_STREAM_NOT_FOUND ? 0 : NGTCP2_ERR_CALLBACK_FAILURE;
}

static int on_stream_close(ngtcp2_conn *quic, uint32_t flags, int64_t id, uint64_t code, void *user_data,
                           void *stream_user_data)
{
    struct connection *connection = user_data;
    (void)stream_user_data;
    if (!(flags & NGTCP2_STREAM_CLOSE_FLAG_APP_ERROR_CODE_SET))
        code = NGHTTP3_H3_NO_ERROR;
    if (!ngtcp2_is_bidi_stream(id))
        return 0;
    int error = connection->http ? nghttp3_conn_close_stream(connection->http, id, code) : 0;
    ngtcp2_conn_extend_max_streams_bidi(quic, 1);
    return error == 0 || error == NGHTTP3_ERR_STREAM_NOT_FOUND ? 0 : NGTCP2_ERR_CALLBACK_FAILURE;
}

static int on_stream_reset(ngtcp2_conn *quic, int64_t id, uint64_t size, uint64_t code, void *user_data,
                           void *stream_user_data)
{
    struct connection *connection = user_data;
    (void)quic, (void)size, (void)code, (void)stream_user_data;
    return connection->http && nghttp3_conn_shutdown_stream_read(connection->http, id) != 0
               ? NGTCP2_ERR_CALLBACK_FAILURE
               : 0;
}

static int on_stop_sending(ngtcp2_conn *quic, int64_t id, uint64_t code, void *user_data, void *stream_user_data)
{
    return on_stream_reset(quic, id, 0, code, user_data, stream_user_data);
}

static int on_max_streams(ngtcp2_conn *quic, uint64_t most, void *user_data)
{
    struct connection *connection = user_data;
    (void)quic;
    if (connection->http)
        nghttp3_conn_set_max_client_streams_bidi(connection->http, most);
    return 0;
}

static int on_max_stream_data(ngtcp2_conn *quic, int64_t id, uint64_t most, void *user_data, void *stream_user_data)
{
    struct connection *connection = user_data;
    (void)quic, (void)most, (void)stream_user_data;
    return connection->http && nghttp3_conn_unblock_stream(connection->http, id) != 0 ? NGTCP2_ERR_CALLBACK_FAILURE : 0;
}

static ngtcp2_conn *quic_of(ngtcp2_crypto_conn_ref *reference)
{
    return ((struct connection *)reference->user_data)->quic;
}

/* TLS. */

static int by_key(const void *one, const void *other)
{
    const struct seen *a = one, *b = other;
    return a->length != b->length ? a->length - b->length : memcmp(a->key, b->key, a->length);
}

/* Whether early data is new here. Another server of the fleet may have seen it: what it asks for must be harmless. */
static int on_early_data(void *context, time_t until, const gnutls_datum_t *key, const gnutls_datum_t *data)
{
    time_t at = time(NULL);
    (void)context, (void)data;
    while (all.ring_count > 0 && all.ring[all.ring_first].until < at) {
        tdelete(&all.ring[all.ring_first], &all.seen, by_key);
        all.ring_first = (all.ring_first + 1) % MAX_SEEN;
        all.ring_count--;
    }
    if (all.ring_count == MAX_SEEN || key->size > sizeof all.ring[0].key)
        return GNUTLS_E_DB_ENTRY_EXISTS; /* refused, as if it were a replay: the client sends it again later */
    struct seen *seen = &all.ring[(all.ring_first + all.ring_count) % MAX_SEEN];
    seen->length = (uint8_t)key->size;
    seen->until = until;
    memcpy(seen->key, key->data, key->size);
    struct seen **found = tsearch(seen, &all.seen, by_key);
    if (!found || *found != seen)
        return GNUTLS_E_DB_ENTRY_EXISTS;
    all.ring_count++;
    return 0;
}

static bool begin_tls(struct connection *connection)
{
    static const gnutls_datum_t h3 = {(unsigned char *)"h3", 2};
    if (gnutls_init(&connection->tls, GNUTLS_SERVER | GNUTLS_ENABLE_EARLY_DATA | GNUTLS_NO_AUTO_SEND_TICKET |
                                          GNUTLS_NO_END_OF_EARLY_DATA) != 0)
        return false;
    gnutls_session_set_ptr(connection->tls, &connection->reference);
    if (all.ticket_key.data) {
        /* routable: the same key on all servers, so that a client whose server died resumes elsewhere. */
        gnutls_session_ticket_enable_server(connection->tls, &all.ticket_key);
        gnutls_anti_replay_enable(connection->tls, all.anti_replay);
        gnutls_record_set_max_early_data_size(connection->tls, 0xffffffff);
    }
    return gnutls_priority_set(connection->tls, all.priority) == 0 &&
           gnutls_credentials_set(connection->tls, GNUTLS_CRD_CERTIFICATE, all.credentials) == 0 &&
           gnutls_alpn_set_protocols(connection->tls, &h3, 1, GNUTLS_ALPN_MANDATORY) == 0 &&
           ngtcp2_crypto_gnutls_configure_server_session(connection->tls) == 0;
}

/* Datagrams. */

/* Makes a connection of a client's Initial. `original` is the DCID of its first one, `retry` the SCID of our Retry. */
static struct connection *accept_connection(const ngtcp2_path *path, const ngtcp2_pkt_hd *header,
                                            const ngtcp2_cid *original, const ngtcp2_cid *retry)
{
    static const ngtcp2_callbacks callbacks = {
        .recv_client_initial = ngtcp2_crypto_recv_client_initial_cb,
        .recv_crypto_data = ngtcp2_crypto_recv_crypto_data_cb,
        .handshake_completed = on_handshake_completed,
        .encrypt = ngtcp2_crypto_encrypt_cb,
        .decrypt = ngtcp2_crypto_decrypt_cb,
        .hp_mask = ngtcp2_crypto_hp_mask_cb,
        .recv_stream_data = on_stream_data,
        .acked_stream_data_offset = on_acked,
        .stream_close = on_stream_close,
        .rand = on_random,
        .get_new_connection_id = on_new_connection_id,
        .remove_connection_id = on_remove_connection_id,
        .update_key = ngtcp2_crypto_update_key_cb,
        .stream_reset = on_stream_reset,
        .extend_max_remote_streams_bidi = on_max_streams,
        .extend_max_stream_data = on_max_stream_data,
        .delete_crypto_aead_ctx = ngtcp2_crypto_delete_crypto_aead_ctx_cb,
        .delete_crypto_cipher_ctx = ngtcp2_crypto_delete_crypto_cipher_ctx_cb,
        .get_path_challenge_data = ngtcp2_crypto_get_path_challenge_data_cb,
        .stream_stop_sending = on_stop_sending,
        .version_negotiation = ngtcp2_crypto_version_negotiation_cb,
        .recv_tx_key = on_tx_key,
    };
    if (all.connection_count == MAX_CONNECTIONS)
        return NULL;
    struct connection *connection = calloc(1, sizeof *connection);
    if (!connection)
        return NULL;
    connection->reference = (ngtcp2_crypto_conn_ref){quic_of, connection};
    ngtcp2_connection_close_error_default(&connection->error);
    ngtcp2_settings settings;
    ngtcp2_settings_default(&settings);
    settings.initial_ts = now(CLOCK_MONOTONIC);
    settings.token = header->token;
    settings.max_window = 6 << 20;
    settings.max_stream_window = 6 << 20;
    ngtcp2_transport_params params;
    ngtcp2_transport_params_default(&params);
    params.initial_max_stream_data_bidi_local = 256 << 10;
    params.initial_max_stream_data_bidi_remote = 256 << 10;
    params.initial_max_stream_data_uni = 256 << 10;
    params.initial_max_data = 1 << 20;
    params.initial_max_streams_bidi = MAX_STREAMS;
    params.initial_max_streams_uni = 3;
    params.max_idle_timeout = all.idle_timeout;
    params.active_connection_id_limit = 7;
    params.original_dcid = *original;
    if (retry) {
        params.retry_scid = *retry;
        params.retry_scid_present = 1;
    }
    /* routable: the first connection ID, and its token in the transport parameters. */
    ngtcp2_cid scid = {.datalen = quiclb_cid_length(all.quiclb)};
    quiclb_new_cid(all.quiclb, scid.data);
    quiclb_token_of(all.quiclb, scid.data, scid.datalen, params.stateless_reset_token);
    params.stateless_reset_token_present = 1;
    if (!begin_tls(connection) ||
        ngtcp2_conn_server_new(&connection->quic, &header->scid, &scid, path, header->version, &callbacks, &settings,
                               &params, NULL, connection) != 0) {
        if (connection->tls)
            gnutls_deinit(connection->tls);
        free(connection);
        return NULL;
    }
    ngtcp2_conn_set_tls_native_handle(connection->quic, connection->tls);
    schedule(connection);
    if (!associate(scid.data, scid.datalen, connection) ||
        !associate(header->dcid.data, header->dcid.datalen, connection)) {
        forget(connection);
        return NULL;
    }
    return connection;
}

static void send_version_negotiation(const ngtcp2_path *path, const ngtcp2_version_cid *ids, size_t length)
{
    static const uint32_t versions[] = {NGTCP2_PROTO_VER_V1};
    uint8_t packet[PACKET], random;
    if (length < NGTCP2_MAX_UDP_PAYLOAD_SIZE)
        return;
    quiclb_random(&random, 1);
    ngtcp2_ssize size = ngtcp2_pkt_write_version_negotiation(packet, sizeof packet, random, ids->scid, ids->scidlen,
                                                             ids->dcid, ids->dcidlen, versions, 1);
    if (size > 0)
        send_datagram(path, packet, (size_t)size);
}

/* routable: the Retry's SCID is where the client's next Initial goes to. */
static void send_retry(const ngtcp2_path *path, const ngtcp2_pkt_hd *header)
{
    uint8_t packet[PACKET], token[NGTCP2_CRYPTO_MAX_RETRY_TOKENLEN];
    ngtcp2_cid scid = {.datalen = quiclb_cid_length(all.quiclb)};
    quiclb_new_cid(all.quiclb, scid.data);
    /* Other servers verify it: by the key that all have, and by the time of day. */
    ngtcp2_ssize length = ngtcp2_crypto_generate_retry_token(
        token, all.token_secrets[0], sizeof all.token_secrets[0], header->version, path->remote.addr,
        path->remote.addrlen, &scid, &header->dcid, now(CLOCK_REALTIME));
    if (length < 0)
        return;
    ngtcp2_ssize size = ngtcp2_crypto_write_retry(packet, sizeof packet, header->version, &header->scid, &scid,
                                                  &header->dcid, token, (size_t)length);
    if (size > 0)
        send_datagram(path, packet, (size_t)size);
}

static bool verify_retry_token(const ngtcp2_path *path, const ngtcp2_pkt_hd *header, ngtcp2_cid *original)
{
    for (size_t i = 0; i < all.token_secret_count; i++)
        if (ngtcp2_crypto_verify_retry_token(original, header->token.base, header->token.len, all.token_secrets[i],
                                             sizeof all.token_secrets[i], header->version, path->remote.addr,
                                             path->remote.addrlen, &header->dcid, TOKEN_LIFETIME,
                                             now(CLOCK_REALTIME)) == 0)
            return true;
    return false;
}

/* Answers an unknown connection ID that can only be ours: that of a connection that this server has forgotten. */
static void send_reset(const ngtcp2_path *path, const uint8_t *cid, size_t cid_length, size_t trigger)
{
    uint8_t packet[128], random[128], token[QUICLB_TOKEN];
    size_t size = quiclb_reset_size(trigger);
    uint64_t time = now(CLOCK_MONOTONIC);
    if (size == 0 || !quiclb_may_reset(all.quiclb, cid, cid_length))
        return;
    all.reset_credit += (double)(time - all.reset_time) / NGTCP2_SECONDS * RESETS_PER_SECOND;
    all.reset_time = time;
    if (all.reset_credit > RESETS_PER_SECOND)
        all.reset_credit = RESETS_PER_SECOND;
    if (all.reset_credit < 1)
        return;
    all.reset_credit -= 1;
    quiclb_token_of(all.quiclb, cid, cid_length, token);
    quiclb_random(random, sizeof random);
    ngtcp2_ssize length = ngtcp2_pkt_write_stateless_reset(packet, size, token, random, size - QUICLB_TOKEN);
    if (length > 0)
        send_datagram(path, packet, (size_t)length);
}

/* A datagram for no connection: the beginning of one, or nothing to go on with. */
static struct connection *read_first(const ngtcp2_path *path, const uint8_t *data, size_t length)
{
    ngtcp2_pkt_hd header;
    ngtcp2_cid original;
    uint8_t packet[PACKET];
    int outcome = ngtcp2_accept(&header, data, length);
    if (outcome != 0 || header.type != NGTCP2_PKT_INITIAL)
        return NULL;
    if (header.token.len > 0 && header.token.base[0] == NGTCP2_CRYPTO_TOKEN_MAGIC_RETRY) {
        if (verify_retry_token(path, &header, &original))
            return accept_connection(path, &header, &original, &header.dcid);
        ngtcp2_ssize size = ngtcp2_crypto_write_connection_close(packet, sizeof packet, header.version, &header.scid,
                                                                 &header.dcid, NGTCP2_INVALID_TOKEN, NULL, 0);
        if (size > 0)
            send_datagram(path, packet, (size_t)size);
        return NULL;
    }
    if (all.retries) {
        send_retry(path, &header);
        return NULL;
    }
    header.token = (ngtcp2_vec){0}; /* another server's or another make's: as if there were none */
    return accept_connection(path, &header, &header.dcid, NULL);
}

static void read_datagram(const ngtcp2_path *path, const uint8_t *data, size_t length)
{
    ngtcp2_version_cid ids;
    ngtcp2_pkt_info info = {0};
    if (length == 0)
        return; /* ngtcp2 0.12 ends the process for an empty datagram, by an assertion */
    int outcome = ngtcp2_pkt_decode_version_cid(&ids, data, length, quiclb_cid_length(all.quiclb));
    if (outcome == NGTCP2_ERR_VERSION_NEGOTIATION)
        send_version_negotiation(path, &ids, length);
    if (outcome != 0)
        return;
    struct connection *connection = find(ids.dcid, ids.dcidlen);
    if (!connection && ids.version == 0) {
        send_reset(path, ids.dcid, ids.dcidlen, length);
        return;
    }
    bool is_new = !connection;
    if (is_new && !(connection = read_first(path, data, length)))
        return;
    if (connection->is_closing) {
        /* Less and less often, so that two parties that close each other come to an end. */
        unsigned heard = ++connection->heard_since_close;
        if (connection->close_packet && (heard & (heard - 1)) == 0)
            send_datagram(path, connection->close_packet, connection->close_length);
        return;
    }
    if (connection->is_draining)
        return;
    int error = ngtcp2_conn_read_pkt(connection->quic, path, &info, data, length, now(CLOCK_MONOTONIC));
    if (error == 0) {
        write_packets(connection);
    } else if (error == NGTCP2_ERR_DRAINING) {
        connection->is_draining = true;
        linger(connection);
    } else if (error == NGTCP2_ERR_DROP_CONN || error == NGTCP2_ERR_RETRY ||
               (is_new && error == NGTCP2_ERR_DISCARD_PKT)) {
        forget(connection);
    } else if (connection->error.type == NGTCP2_CONNECTION_CLOSE_ERROR_CODE_TYPE_APPLICATION) {
        close_connection(connection);
    } else {
        fail(connection, error);
    }
}

static void read_socket(struct endpoint *endpoint)
{
    static uint8_t data[65536];
    for (int i = 0; i < READS; i++) {
        struct sockaddr_storage remote = {0};
        socklen_t remote_length = sizeof remote;
        ssize_t length = recvfrom(endpoint->socket, data, sizeof data, 0, (struct sockaddr *)&remote, &remote_length);
        if (length < 0)
            return;
        ngtcp2_path path = {
            .local = {(struct sockaddr *)&endpoint->address, endpoint->length},
            .remote = {(struct sockaddr *)&remote, remote_length},
            .user_data = endpoint,
        };
        read_datagram(&path, data, (size_t)length);
    }
}

static void expire(struct connection *connection)
{
    if (connection->is_closing || connection->is_draining) {
        forget(connection);
        return;
    }
    tick(connection);
    uint64_t time = now(CLOCK_MONOTONIC);
    if (ngtcp2_conn_get_expiry(connection->quic) <= time) {
        int error = ngtcp2_conn_handle_expiry(connection->quic, time);
        if (error == NGTCP2_ERR_IDLE_CLOSE || error == NGTCP2_ERR_HANDSHAKE_TIMEOUT) {
            forget(connection);
            return;
        }
        if (error != 0) {
            fail(connection, error);
            return;
        }
    }
    write_packets(connection);
}

/* The process. */

static bool listen_at(const char *text)
{
    char host[64];
    const char *colon = strrchr(text, ':');
    struct addrinfo *found = NULL, hints = {
        .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV | AI_PASSIVE,
        .ai_socktype = SOCK_DGRAM,
    };
    bool is_bracketed = text[0] == '[' && colon && colon[-1] == ']';
    if (!colon || all.endpoint_count == MAX_LISTEN || (size_t)(colon - text) >= sizeof host) {
        say("--listen %s: expected ADDRESS:PORT", text);
        return false;
    }
    snprintf(host, sizeof host, "%.*s", (int)(colon - text) - 2 * is_bracketed, text + is_bracketed);
    if (getaddrinfo(host, colon + 1, &hints, &found) != 0) {
        say("--listen %s: expected ADDRESS:PORT", text);
        return false;
    }
    struct endpoint *endpoint = &all.endpoints[all.endpoint_count];
    int on = 1, size = SOCKET_BUFFER;
    endpoint->length = sizeof endpoint->address;
    endpoint->socket = socket(found->ai_family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    bool is_good = endpoint->socket >= 0;
    if (is_good && found->ai_family == AF_INET6)
        is_good = setsockopt(endpoint->socket, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on) == 0;
    if (is_good) {
        setsockopt(endpoint->socket, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
        setsockopt(endpoint->socket, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
        is_good = bind(endpoint->socket, found->ai_addr, found->ai_addrlen) == 0 &&
                  getsockname(endpoint->socket, (struct sockaddr *)&endpoint->address, &endpoint->length) == 0;
    }
    if (!is_good)
        say("--listen %s: %s", text, strerror(errno));
    freeaddrinfo(found);
    all.endpoint_count += is_good;
    return is_good;
}

/* A key for one purpose, of those that the operator has given for all. */
static void derive(const uint8_t key[32], const char *purpose, uint8_t derived[SHA256_DIGEST_SIZE])
{
    struct hmac_sha256_ctx hmac;
    hmac_sha256_set_key(&hmac, 32, key);
    hmac_sha256_update(&hmac, strlen(purpose), (const uint8_t *)purpose);
    hmac_sha256_digest(&hmac, SHA256_DIGEST_SIZE, derived);
}

/* Reads the token keys again, or makes one up if there is no file. False, and nothing changed, if they are refused. */
static bool take_token_keys(const char *path, struct quiclb_mistakes *mistakes)
{
    static uint8_t tickets[2 * SHA256_DIGEST_SIZE];
    uint8_t keys[MAX_TOKEN_KEYS][32];
    size_t count = 1;
    if (path && !(count = quiclb_read_keys(path, keys, MAX_TOKEN_KEYS, mistakes)))
        return false;
    if (!path)
        quiclb_random(keys[0], sizeof keys[0]);
    for (size_t i = 0; i < count; i++)
        derive(keys[i], "quiclb ngtcp2 retry tokens", all.token_secrets[i]);
    all.token_secret_count = count;
    /* GnuTLS takes one key for tickets, of 64 octets, and makes others of it as time goes on. */
    derive(keys[0], "quiclb ngtcp2 tickets 1", tickets);
    derive(keys[0], "quiclb ngtcp2 tickets 2", tickets + SHA256_DIGEST_SIZE);
    all.ticket_key = (gnutls_datum_t){tickets, sizeof tickets};
    explicit_bzero(keys, sizeof keys);
    return true;
}

static bool prepare_tls(const char *certificate, const char *key)
{
    static const char priority[] =
        "NORMAL:-VERS-ALL:+VERS-TLS1.3:%DISABLE_TLS13_COMPAT_MODE:-CIPHER-ALL:+AES-128-GCM:+AES-256-GCM:"
        "+CHACHA20-POLY1305:-GROUP-ALL:+GROUP-X25519:+GROUP-SECP256R1:+GROUP-SECP384R1";
    int error = gnutls_certificate_allocate_credentials(&all.credentials);
    if (error == 0)
        error = gnutls_certificate_set_x509_key_file(all.credentials, certificate, key, GNUTLS_X509_FMT_PEM);
    if (error < 0) {
        say("%s, %s: %s", certificate, key, gnutls_strerror(error));
        return false;
    }
    if (gnutls_priority_init(&all.priority, priority, NULL) != 0 || gnutls_anti_replay_init(&all.anti_replay) != 0)
        abort();
    gnutls_anti_replay_set_add_function(all.anti_replay, on_early_data);
    return true;
}

static void prepare_bodies(void)
{
    size_t room = sizeof all.line_ends / sizeof all.line_ends[0] * 6, length = 0;
    for (size_t i = 0; i < sizeof all.chunk; i++)
        all.chunk[i] = (uint8_t)i;
    if (!(all.lines = malloc(room)))
        abort();
    for (size_t i = 0; i < sizeof all.line_ends / sizeof all.line_ends[0]; i++) {
        length += (size_t)snprintf(all.lines + length, room - length, "%zu\n", i);
        all.line_ends[i] = (uint32_t)length;
    }
}

static void reload(const char *token_keys)
{
    struct quiclb_mistakes mistakes = {0};
    /* routable: new connection IDs are made as the file says now. ngtcp2 0.12 cannot have clients retire the others. */
    bool is_good = quiclb_reload(all.quiclb, &mistakes);
    say_mistakes(&mistakes);
    mistakes.count = 0;
    if (token_keys && !take_token_keys(token_keys, &mistakes))
        is_good = false;
    say_mistakes(&mistakes);
    say(is_good ? "reloaded" : "reload refused; what was in use is still");
}

static void stop(void)
{
    for (size_t i = 1; i <= all.connection_count; i++) {
        struct connection *connection = all.heap[i];
        if (connection->http && !connection->is_closing)
            nghttp3_conn_shutdown(connection->http); /* GOAWAY */
    }
    while (all.connection_count > 0) {
        struct connection *connection = all.heap[1];
        write_packets(connection);
        ngtcp2_connection_close_error_set_application_error(&connection->error, NGHTTP3_H3_NO_ERROR, NULL, 0);
        close_connection(connection);
        forget(connection);
    }
}

static int run(const char *token_keys)
{
    struct epoll_event events[MAX_LISTEN + 1];
    sigset_t signals;
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    sigemptyset(&signals);
    sigaddset(&signals, SIGHUP);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    int signal = signalfd(-1, &signals, SFD_NONBLOCK | SFD_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll < 0 || signal < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, signal, &event) < 0)
        return EXIT_FAILURE;
    for (size_t i = 0; i < all.endpoint_count; i++) {
        event.data.ptr = &all.endpoints[i];
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, all.endpoints[i].socket, &event) < 0)
            return EXIT_FAILURE;
    }
    printf("ready");
    for (size_t i = 0; i < all.endpoint_count; i++) {
        char text[80];
        ngtcp2_addr address = {(struct sockaddr *)&all.endpoints[i].address, all.endpoints[i].length};
        print_address(&address, text);
        printf(" %s", text);
    }
    printf("\n");
    fflush(stdout);
    for (;;) {
        uint64_t deadline = all.connection_count ? all.heap[1]->deadline : NEVER, time = now(CLOCK_MONOTONIC);
        int wait = deadline == NEVER ? -1
                   : deadline <= time ? 0
                   : deadline - time > 60 * NGTCP2_SECONDS ? 60000
                                                           : (int)((deadline - time + 999999) / 1000000);
        int count = epoll_wait(epoll, events, sizeof events / sizeof events[0], wait);
        for (int i = 0; i < count; i++) {
            struct signalfd_siginfo info;
            if (events[i].data.ptr) {
                read_socket(events[i].data.ptr);
            } else if (read(signal, &info, sizeof info) == sizeof info) {
                if (info.ssi_signo != SIGHUP) {
                    stop();
                    close(signal);
                    close(epoll);
                    return EXIT_SUCCESS;
                }
                reload(token_keys);
            }
        }
        time = now(CLOCK_MONOTONIC);
        /* Each at most once in a turn: a deadline that has passed already would keep the sockets waiting. */
        for (size_t turns = all.connection_count; turns > 0 && all.connection_count; turns--) {
            if (all.heap[1]->deadline > time)
                break;
            expire(all.heap[1]);
        }
    }
}

static const char usage[] =
    "usage: server --listen ADDRESS:PORT [--listen ...] --server-config FILE --cert PEM --key PEM [--name NAME]\n"
    "              [--retry] [--token-key-file FILE] [--idle-timeout SECONDS]\n";

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"listen", required_argument, NULL, 'l'},       {"server-config", required_argument, NULL, 's'},
        {"cert", required_argument, NULL, 'c'},         {"key", required_argument, NULL, 'k'},
        {"name", required_argument, NULL, 'n'},         {"retry", no_argument, NULL, 'r'},
        {"token-key-file", required_argument, NULL, 't'}, {"idle-timeout", required_argument, NULL, 'i'},
        {"help", no_argument, NULL, 'h'},               {NULL, 0, NULL, 0},
    };
    const char *config = NULL, *certificate = NULL, *key = NULL, *token_keys = NULL;
    const char *listens[MAX_LISTEN];
    size_t listen_count = 0;
    double idle = 30;
    struct quiclb_mistakes mistakes = {0};
    bool is_good = true;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        char *end = "";
        switch (option) {
        case 'l':
            if (listen_count == MAX_LISTEN)
                return EXIT_USAGE;
            listens[listen_count++] = optarg;
            break;
        case 's':
            config = optarg;
            break;
        case 'c':
            certificate = optarg;
            break;
        case 'k':
            key = optarg;
            break;
        case 'n':
            all.name = optarg;
            break;
        case 'r':
            all.retries = true;
            break;
        case 't':
            token_keys = optarg;
            break;
        case 'i':
            idle = strtod(optarg, &end);
            if (*end || !(idle > 0 && idle <= 3600)) {
                say("--idle-timeout %s: expected seconds, up to 3600", optarg);
                is_good = false;
            }
            break;
        case 'h':
            fputs(usage, stdout);
            return EXIT_SUCCESS;
        default:
            fputs(usage, stderr);
            return EXIT_USAGE;
        }
    }
    if (!config || !certificate || !key || !listen_count || optind != argc) {
        fputs(usage, stderr);
        return EXIT_USAGE;
    }
    if (all.name && strspn(all.name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") !=
                        strlen(all.name)) {
        say("--name: expected letters, digits, dots, hyphens and underscores");
        is_good = false;
    }
    all.idle_timeout = (uint64_t)(idle * NGTCP2_SECONDS);
    all.reset_time = now(CLOCK_MONOTONIC);
    all.reset_credit = RESETS_PER_SECOND;
    prepare_bodies();
    is_good = prepare_tls(certificate, key) && is_good;
    is_good = take_token_keys(token_keys, &mistakes) && is_good;
    say_mistakes(&mistakes);
    all.quiclb = quiclb_open(config, &mistakes);
    say_mistakes(&mistakes);
    if (!all.quiclb || !is_good)
        return EXIT_USAGE;
    for (size_t i = 0; i < listen_count; i++)
        if (!listen_at(listens[i]))
            return EXIT_FAILURE;
    int status = run(token_keys);
    for (size_t i = 0; i < all.endpoint_count; i++)
        close(all.endpoints[i].socket);
    quiclb_close(all.quiclb);
    gnutls_certificate_free_credentials(all.credentials);
    gnutls_priority_deinit(all.priority);
    gnutls_anti_replay_deinit(all.anti_replay);
    free(all.lines);
    return status;
}
