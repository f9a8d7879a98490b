/* The bench's load: QUIC-shaped datagrams from many flows, and the backends that receive and count them.
 *
 * One thread on one core, one epoll set, no allocation once it runs. A run is bounded in time and rate:
 *
 *   warm-up   each flow sends one datagram until its backend has seen it (and, where wanted, answered it)
 *   "start"   on standard output; then it waits for a line on standard input, so that clocks can be read
 *   load      for --seconds at --rate datagrams a second, at most --window of them under way; then "stop", a line again, after the last arrivals
 *   result    one line of JSON
 *
 * A datagram is a short header's first octet, the flow's CID, and the flow's number (4 octets, big endian). Flow f
 * was given a CID of backend f % backends. A datagram that arrives at another one, or a reply at another flow's
 * socket, counts as misrouted, whatever else is right about it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#define UDP_GRO 104
#endif

enum {
	MAX_SIZE = 1472,         /* octets of UDP payload that an Ethernet frame carries over IPv4 */
	MAX_BURST = 44,          /* datagrams of MAX_SIZE that one GSO send of 65 000 octets holds */
	MAX_BACKENDS = 256,
	MAX_CID = 20,
	RECEIVE = 64 * 1024,     /* a coalesced train arrives whole or not at all */
	RECEIVES = 16,           /* messages per recvmmsg */
	EVENTS = 64,
	QUANTUM = 32,            /* datagrams sent between two looks at the arrivals: neither side starves */
	CLIENT_SOCKETS = 256,    /* one port each, every client address */
	FIRST_PORT = 10000,
	BACKEND_PORT = 4433,
	SOCKET_BUFFER = 8 << 20,
};

static const double STALL = .05; /* seconds */

/* What is offered: datagrams up one at a time, eight in eight packets, eight in one GSO send; one up and back; eight
 * in one GSO send down; one up and back on each flow, twice. */
enum load { SINGLE, BURST, TRAIN, ECHO, DOWNLOAD, SETUP };
static const char *const load_names[] = {"single", "burst", "train", "echo", "download", "setup"};

struct flow {
	uint32_t backend;             /* where its last datagram arrived */
	struct sockaddr_in upstream;  /* and where it came from: the balancer's side; port 0 before the first */
	bool answered;                /* a reply has reached the client */
};

struct counts {
	uint64_t sent;                /* of the load: replies are not counted */
	uint64_t refused;             /* the kernel did not take it: a full queue, mostly */
	uint64_t delivered;           /* at the right end: the backend, or the client for echo and download */
	uint64_t misrouted;           /* at a backend that is not the CID's, or at another flow's client */
	uint64_t moved;               /* at the backend from another address of the balancer than the flow's last */
	uint64_t alien;               /* not one of ours, or damaged */
	uint64_t overrun;             /* lost on our own side, because we did not receive fast enough */
};

static enum load load;
static struct sockaddr_in target;
static uint32_t flow_count = 256, backend_count = 16;
static uint32_t size = 1200, burst = 8, cid_length = 17;
static uint32_t window;           /* datagrams under way at a time; 0: as many as the rate makes */
static double rate = 100000, seconds = 2;
static struct flow *flows;
static uint8_t *cids;
static struct in_addr first_client;
static int client_fds[CLIENT_SOCKETS], backend_fds[MAX_BACKENDS];
static int epoll_fd;
static struct counts counts;
static uint32_t seen, answered;   /* flows with a datagram at a backend; with a reply at the client */

static uint8_t send_buffer[MAX_BURST * MAX_SIZE];
static uint8_t receive_buffers[RECEIVES][RECEIVE];

static void die(const char *what)
{
	fprintf(stderr, "generator: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static uint32_t backend_of(uint32_t flow)
{
	return flow % backend_count;
}

/* Sets one integer option; the ones we need exist since Linux 5.0, so that a refusal is worth stopping for. */
static void set(int fd, int level, int option, int value)
{
	if (setsockopt(fd, level, option, &value, sizeof value))
		die("setsockopt");
}

static int udp_socket(struct in_addr address, uint16_t port, uint32_t tag)
{
	struct sockaddr_in local = {.sin_family = AF_INET, .sin_addr = address, .sin_port = htons(port)};
	struct epoll_event event = {.events = EPOLLIN, .data.u32 = tag};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		die("socket");
	if (bind(fd, (struct sockaddr *)&local, sizeof local))
		die("bind");
	/* As a network card's coalescing would: a train that the balancer sent whole is received whole. */
	set(fd, IPPROTO_UDP, UDP_GRO, 1);
	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
	return fd;
}

/* Tags of the epoll set: client sockets count from 0, backends from the end. */
static uint32_t backend_tag(uint32_t backend)
{
	return UINT32_MAX - backend;
}

static bool is_backend(uint32_t tag)
{
	return tag > backend_tag(MAX_BACKENDS);
}

static void open_backends(struct in_addr first)
{
	for (uint32_t i = 0; i < backend_count; i++) {
		struct in_addr address = {htonl(ntohl(first.s_addr) + i)};

		backend_fds[i] = udp_socket(address, BACKEND_PORT, backend_tag(i));
		set(backend_fds[i], SOL_SOCKET, SO_RCVBUFFORCE, SOCKET_BUFFER);
		set(backend_fds[i], SOL_SOCKET, SO_SNDBUFFORCE, SOCKET_BUFFER);
	}
}

/* A hundred thousand flows do not take as many sockets here. The client addresses are a prefix that is routed to
 * this machine as a whole, so that a socket bound to a port only has that port of each of them. Flow f is socket
 * f % CLIENT_SOCKETS at address f / CLIENT_SOCKETS.
 */
static void open_clients(void)
{
	for (uint32_t i = 0; i < CLIENT_SOCKETS; i++) {
		client_fds[i] = udp_socket((struct in_addr){INADDR_ANY}, (uint16_t)(FIRST_PORT + i), i);
		set(client_fds[i], IPPROTO_IP, IP_PKTINFO, 1);
		set(client_fds[i], SOL_SOCKET, SO_RCVBUFFORCE, SOCKET_BUFFER);
	}
}

static struct in_addr client_address(uint32_t flow)
{
	return (struct in_addr){htonl(ntohl(first_client.s_addr) + flow / CLIENT_SOCKETS)};
}

static void load_cids(const char *path)
{
	FILE *file = fopen(path, "rb");

	cids = malloc((size_t)flow_count * cid_length);
	if (!file || !cids || fread(cids, cid_length, flow_count, file) != flow_count)
		die(path);
	fclose(file);
}

static void write_datagram(uint8_t *at, uint32_t flow)
{
	uint32_t number = htonl(flow);

	at[0] = 0x40; /* a short header: header form 0, fixed bit 1 */
	memcpy(at + 1, cids + (size_t)flow * cid_length, cid_length);
	memcpy(at + 1 + cid_length, &number, sizeof number);
}

/* The flow that a datagram belongs to, or -1: its CID must be the one that the flow was given. */
static int64_t read_datagram(const uint8_t *at, size_t length)
{
	uint32_t flow;

	if (length != size)
		return -1;
	memcpy(&flow, at + 1 + cid_length, sizeof flow);
	flow = ntohl(flow);
	if (flow >= flow_count || memcmp(at + 1, cids + (size_t)flow * cid_length, cid_length))
		return -1;
	return flow;
}

/* Adds a control message to a header that has room for it. */
static void add_control(struct msghdr *message, int level, int type, const void *value, size_t length)
{
	struct cmsghdr *c = (void *)((uint8_t *)message->msg_control + message->msg_controllen);

	c->cmsg_level = level;
	c->cmsg_type = type;
	c->cmsg_len = CMSG_LEN(length);
	memcpy(CMSG_DATA(c), value, length);
	message->msg_controllen += CMSG_SPACE(length);
}

/* Sends datagrams of one flow, from an address if one is given. Returns how many the kernel took. */
static uint64_t send_datagrams(int fd, uint32_t flow, const struct in_addr *from, struct sockaddr_in *to,
			       uint32_t datagrams, bool coalesced)
{
	struct iovec parts[MAX_BURST];
	struct mmsghdr messages[MAX_BURST];
	_Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(struct in_pktinfo)) + CMSG_SPACE(sizeof(uint16_t))];
	struct msghdr header = {.msg_name = to, .msg_namelen = sizeof *to, .msg_iovlen = 1, .msg_control = control};
	uint32_t message_count = coalesced ? 1 : datagrams;
	uint16_t segment = (uint16_t)size;
	int taken;

	if (from)
		add_control(&header, IPPROTO_IP, IP_PKTINFO, &(struct in_pktinfo){.ipi_spec_dst = *from},
			    sizeof(struct in_pktinfo));
	if (coalesced && datagrams > 1)
		add_control(&header, IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof segment);
	for (uint32_t i = 0; i < datagrams; i++)
		write_datagram(send_buffer + (size_t)i * size, flow);
	for (uint32_t i = 0; i < message_count; i++) {
		parts[i] = (struct iovec){send_buffer + (size_t)i * size, coalesced ? (size_t)datagrams * size : size};
		messages[i].msg_hdr = header;
		messages[i].msg_hdr.msg_iov = &parts[i];
	}
	taken = sendmmsg(fd, messages, message_count, 0);
	if (taken < 0)
		taken = 0; /* counted, and the run goes on */
	if (coalesced && taken)
		taken = (int)datagrams;
	counts.refused += datagrams - (uint64_t)taken;
	return (uint64_t)taken;
}

static uint64_t send_up(uint32_t flow, uint32_t datagrams, bool coalesced)
{
	struct in_addr from = client_address(flow);

	return send_datagrams(client_fds[flow % CLIENT_SOCKETS], flow, &from, &target, datagrams, coalesced);
}

static uint64_t send_down(uint32_t flow, uint32_t datagrams, bool coalesced)
{
	int fd = backend_fds[flows[flow].backend];

	return send_datagrams(fd, flow, NULL, &flows[flow].upstream, datagrams, coalesced);
}

static bool answers(void)
{
	return load == ECHO || load == SETUP;
}

static bool delivers_to_client(void)
{
	return answers() || load == DOWNLOAD;
}

static void arrived_at_backend(uint32_t backend, int64_t number, const struct sockaddr_in *from)
{
	struct flow *flow;

	if (number < 0) {
		counts.alien++;
		return;
	}
	flow = &flows[number];
	if (!flow->upstream.sin_port)
		seen++;
	else if (flow->upstream.sin_port != from->sin_port || flow->upstream.sin_addr.s_addr != from->sin_addr.s_addr)
		counts.moved++;
	flow->upstream = *from;
	flow->backend = backend;
	counts.misrouted += backend != backend_of((uint32_t)number);
	counts.delivered += !delivers_to_client();
	if (answers())
		send_down((uint32_t)number, 1, false);
}

static void arrived_at_client(uint32_t client, int64_t number, struct in_addr to)
{
	struct flow *flow;

	if (number < 0) {
		counts.alien++;
		return;
	}
	flow = &flows[number];
	if (!flow->answered)
		answered++;
	flow->answered = true;
	counts.misrouted += (uint32_t)number % CLIENT_SOCKETS != client ||
			    client_address((uint32_t)number).s_addr != to.s_addr;
	counts.delivered += delivers_to_client();
}

/* A control message's value, left as it is if there is none. */
static void read_control(struct msghdr *message, int level, int type, void *value, size_t length)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c))
		if (c->cmsg_level == level && c->cmsg_type == type)
			memcpy(value, CMSG_DATA(c), length);
}

static void arrived(uint32_t tag, struct mmsghdr *message)
{
	struct msghdr *header = &message->msg_hdr;
	const uint8_t *octets = header->msg_iov->iov_base;
	size_t length = message->msg_len;
	int segment = (int)length; /* unless it is a coalesced train */
	struct in_pktinfo to = {0};

	read_control(header, IPPROTO_UDP, UDP_GRO, &segment, sizeof segment);
	read_control(header, IPPROTO_IP, IP_PKTINFO, &to, sizeof to);
	for (size_t at = 0; at < length; at += (size_t)segment) {
		size_t left = length - at;
		int64_t flow = read_datagram(octets + at, left < (size_t)segment ? left : (size_t)segment);

		if (is_backend(tag))
			arrived_at_backend(UINT32_MAX - tag, flow, header->msg_name);
		else
			arrived_at_client(tag, flow, to.ipi_addr);
	}
}

static bool receive(uint32_t tag)
{
	struct sockaddr_in from[RECEIVES];
	struct iovec parts[RECEIVES];
	struct mmsghdr messages[RECEIVES];
	_Alignas(struct cmsghdr) uint8_t control[RECEIVES][128];
	int fd = is_backend(tag) ? backend_fds[UINT32_MAX - tag] : client_fds[tag];
	int taken;

	for (int i = 0; i < RECEIVES; i++) {
		parts[i] = (struct iovec){receive_buffers[i], RECEIVE};
		messages[i].msg_hdr = (struct msghdr){
			.msg_name = &from[i], .msg_namelen = sizeof from[i], .msg_iov = &parts[i], .msg_iovlen = 1,
			.msg_control = control[i], .msg_controllen = sizeof control[i],
		};
	}
	taken = recvmmsg(fd, messages, RECEIVES, 0, NULL);
	for (int i = 0; i < taken; i++)
		arrived(tag, &messages[i]);
	return taken > 0;
}

/* Receives once from every socket that has something, without waiting. False if none had. */
static bool receive_all(void)
{
	struct epoll_event events[EVENTS];
	int ready = epoll_wait(epoll_fd, events, EVENTS, 0);
	bool any = false;

	for (int i = 0; i < ready; i++)
		any |= receive(events[i].data.u32);
	return any;
}

/* Receives until nothing has come for `quiet` seconds, two seconds at most. */
static void receive_until_quiet(double quiet)
{
	double end = now() + 2, last = now();

	while (now() - last < quiet && now() < end) {
		if (receive_all())
			last = now();
		else
			nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
	}
}

static bool is_warm(uint32_t flow)
{
	return load == ECHO ? flows[flow].answered : flows[flow].upstream.sin_port != 0;
}

static void warm_up(void)
{
	double end = now() + 10;

	do {
		for (uint32_t i = 0; i < flow_count; i++) {
			if (!is_warm(i))
				send_up(i, 1, false);
			if (i % QUANTUM == 0)
				receive_all();
		}
		receive_until_quiet(.02);
		if ((load == ECHO ? answered : seen) == flow_count)
			return;
	} while (now() < end);
	fprintf(stderr, "generator: after 10 s only %u of %u flows get through\n",
		load == ECHO ? answered : seen, flow_count);
	exit(1);
}

static uint64_t send_unit(uint32_t flow)
{
	switch (load) {
	case BURST:
		return send_up(flow, burst, false);
	case TRAIN:
		return send_up(flow, burst, true);
	case DOWNLOAD:
		return send_down(flow, burst, true);
	default:
		return send_up(flow, 1, false);
	}
}

/* How many more datagrams may be under way. What has not come for STALL seconds is lost, and waited for no longer. */
static uint64_t room(double t)
{
	static uint64_t delivered, lost;
	static double last;

	if (counts.delivered != delivered) {
		delivered = counts.delivered;
		last = t;
	}
	if (counts.sent > delivered + lost && t - last > STALL) {
		lost = counts.sent - delivered;
		last = t;
	}
	uint64_t under_way = counts.sent > delivered + lost ? counts.sent - delivered - lost : 0;

	return under_way < window ? window - under_way : 0;
}

/* Offers the load, flow after flow, and returns how long that took. */
static double offer(void)
{
	uint32_t unit = load == BURST || load == TRAIN || load == DOWNLOAD ? burst : 1;
	double start = now(), t, issued = 0;
	uint64_t units = 0, most = load == SETUP ? 2 * (uint64_t)flow_count : UINT64_MAX;

	while (t = now() - start, t < seconds && units < most) {
		double due = t * rate - issued;

		/* What core 0 could not offer in time is not made up for by a burst that nobody asked for. */
		if (due > 4 * QUANTUM) {
			issued += due - 4 * QUANTUM;
			due = 4 * QUANTUM;
		}
		if (window && due > (double)room(t))
			due = (double)room(t);
		for (uint32_t sent = 0; sent < QUANTUM && due >= unit && units < most; sent += unit, due -= unit) {
			counts.sent += send_unit((uint32_t)(units++ % flow_count));
			issued += unit;
		}
		receive_all();
	}
	return t;
}

static uint64_t drops(int fd)
{
	uint32_t info[SK_MEMINFO_VARS];
	socklen_t length = sizeof info;

	if (getsockopt(fd, SOL_SOCKET, SO_MEMINFO, info, &length))
		die("getsockopt");
	return info[SK_MEMINFO_DROPS];
}

static uint64_t all_drops(void)
{
	uint64_t sum = 0;

	for (uint32_t i = 0; i < backend_count; i++)
		sum += drops(backend_fds[i]);
	for (uint32_t i = 0; i < CLIENT_SOCKETS; i++)
		sum += drops(client_fds[i]);
	return sum;
}

/* Says where the run is and waits until whoever reads the clocks has read them. */
static void tell(const char *moment)
{
	printf("%s\n", moment);
	fflush(stdout);
	if (getchar() != '\n')
		exit(1);
}

static void parse(int argc, char **argv, struct in_addr *first_backend, const char **cid_file)
{
	static const struct option options[] = {
		{"load", required_argument, 0, 'l'},       {"target", required_argument, 0, 't'},
		{"port", required_argument, 0, 'p'},       {"clients", required_argument, 0, 'c'},
		{"backends", required_argument, 0, 'b'},   {"cids", required_argument, 0, 'i'},
		{"cid-length", required_argument, 0, 'L'}, {"flows", required_argument, 0, 'f'},
		{"size", required_argument, 0, 's'},       {"burst", required_argument, 0, 'B'},
		{"rate", required_argument, 0, 'r'},       {"seconds", required_argument, 0, 'S'},
		{"window", required_argument, 0, 'w'},     {"backend-count", required_argument, 0, 'n'},
		{0, 0, 0, 0},
	};
	bool good = true;
	int option;

	target.sin_family = AF_INET;
	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case 'l':
			for (load = SINGLE; load <= SETUP && strcmp(load_names[load], optarg);)
				load++;
			good &= load <= SETUP;
			break;
		case 't': good &= inet_aton(optarg, &target.sin_addr) != 0; break;
		case 'p': target.sin_port = htons((uint16_t)atoi(optarg)); break;
		case 'c': good &= inet_aton(optarg, &first_client) != 0; break;
		case 'b': good &= inet_aton(optarg, first_backend) != 0; break;
		case 'i': *cid_file = optarg; break;
		case 'L': cid_length = (uint32_t)atoi(optarg); break;
		case 'f': flow_count = (uint32_t)atoi(optarg); break;
		case 'n': backend_count = (uint32_t)atoi(optarg); break;
		case 's': size = (uint32_t)atoi(optarg); break;
		case 'B': burst = (uint32_t)atoi(optarg); break;
		case 'w': window = (uint32_t)atoi(optarg); break;
		case 'r': rate = atof(optarg); break;
		case 'S': seconds = atof(optarg); break;
		default: good = false;
		}
	}
	good &= *cid_file && target.sin_port && first_client.s_addr && first_backend->s_addr;
	good &= cid_length >= 1 && cid_length <= MAX_CID && size >= 1 + cid_length + 4 && size <= MAX_SIZE;
	good &= (!window || window >= burst) && burst >= 1 && burst <= MAX_BURST && rate > 0 && seconds > 0 && seconds <= 60;
	good &= backend_count >= 1 && backend_count <= MAX_BACKENDS && flow_count >= 1 && flow_count <= 1000000;
	if (!good) {
		fprintf(stderr, "generator: bad arguments; python -m bench knows them\n");
		exit(2);
	}
}

int main(int argc, char **argv)
{
	struct in_addr first_backend = {0};
	const char *cid_file = NULL;
	double took;

	parse(argc, argv, &first_backend, &cid_file);
	load_cids(cid_file);
	flows = calloc(flow_count, sizeof *flows);
	if (!flows)
		die("calloc");
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (epoll_fd < 0)
		die("epoll_create1");
	open_backends(first_backend);
	open_clients();

	if (load != SETUP)
		warm_up();
	counts = (struct counts){0};
	tell("start");
	took = offer();
	/* A set-up that is late is still a set-up; for the rest, what a queue still holds is all that can come. */
	receive_until_quiet(load == SETUP ? .5 : .02);
	tell("stop");
	counts.overrun = all_drops();

	printf("{\"load\": \"%s\", \"seconds\": %.6f, \"flows\": %" PRIu32 ", \"answered\": %" PRIu32 ", ",
	       load_names[load], took, flow_count, answered);
	printf("\"sent\": %" PRIu64 ", \"refused\": %" PRIu64 ", \"delivered\": %" PRIu64 ", ", counts.sent,
	       counts.refused, counts.delivered);
	printf("\"misrouted\": %" PRIu64 ", \"moved\": %" PRIu64 ", \"alien\": %" PRIu64 ", ", counts.misrouted,
	       counts.moved, counts.alien);
	printf("\"overrun\": %" PRIu64 "}\n", counts.overrun);
	return 0;
}
