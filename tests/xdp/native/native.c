/*
 * The headers of the XDP program as an ordinary program, for sanitizers to watch. It answers requests from standard
 * input on standard output: each is a letter, a length and as many octets; each answer is a length and octets. Lengths
 * are 32-bit words, and everything is in the byte order of the machine.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "helpers.h"

#include "checksum.h"
#include "cid.h"
#include "decode.h"
#include "forward.h"
#include "quic.h"
#include "token.h"

struct request {
	__u8 *octets;
	__u32 length;
};

/* The next octets of a request. */
static void take(struct request *request, void *to, __u32 length)
{
	if (length > request->length) {
		fprintf(stderr, "a request lacks %u octets\n", length - request->length);
		exit(2);
	}
	memcpy(to, request->octets, length);
	request->octets += length;
	request->length -= length;
}

#define TAKE(request, variable) take(request, &(variable), sizeof(variable))

static void answer(const void *octets, __u32 length)
{
	fwrite(&length, sizeof(length), 1, stdout);
	fwrite(octets, 1, length, stdout);
	fflush(stdout);
}

/* What Python sets in the program before the kernel loads it. gcc keeps it in writable memory: it is volatile. */
static void set_tables(struct request *request)
{
	take(request, (void *)&aes_tables, sizeof(aes_tables));
	answer("", 0);
}

static void set_settings(struct request *request)
{
	take(request, (void *)&settings, sizeof(settings));
	answer("", 0);
}

static void encrypt(struct request *request)
{
	__u32 key[AES_KEY_WORDS];
	struct block block;

	TAKE(request, key);
	TAKE(request, block);
	aes128_encrypt(key, &block);
	answer(&block, sizeof(block));
}

static void decrypt(struct request *request)
{
	__u32 key[AES_KEY_WORDS];
	struct block block;

	TAKE(request, key);
	TAKE(request, block);
	aes128_decrypt(key, &block);
	answer(&block, sizeof(block));
}

static void encrypt_sliced(struct request *request)
{
	__u64 key[AES_SLICED_WORDS];
	struct block block;

	TAKE(request, key);
	TAKE(request, block);
	aes128_encrypt_sliced(key, &block);
	answer(&block, sizeof(block));
}

static void decrypt_sliced(struct request *request)
{
	__u64 key[AES_SLICED_WORDS];
	struct block block;

	TAKE(request, key);
	TAKE(request, block);
	aes128_decrypt_sliced(key, &block);
	answer(&block, sizeof(block));
}

/* A configuration and the first MAX_CID octets of a CID to the server ID. */
static void server_id(struct request *request)
{
	struct server_key key = {};
	struct cid_config config;
	__u64 octets_0, octets_8;
	__u32 octets_16;

	TAKE(request, config);
	TAKE(request, octets_0);
	TAKE(request, octets_8);
	TAKE(request, octets_16);
	cid_server_id(&config, octets_0, octets_8, octets_16, &key);
	answer(key.server_id, sizeof(key.server_id));
}

/* A reset key and the first MAX_CID octets of a CID of some length to its token, and the key as it is afterwards. */
static void token(struct request *request)
{
	struct {
		__u32 token[RESET_TOKEN / 4];
		struct reset_key key;
	} answered;
	__u32 cid[CID_WORDS], length;
	struct token_work work;

	TAKE(request, answered.key);
	TAKE(request, length);
	TAKE(request, cid);
	memset(&work, 0xa5, sizeof(work)); /* as some other key left it */
	if (reset_token(&answered.key, cid, length, &work, answered.token)) {
		fprintf(stderr, "no token\n");
		exit(2);
	}
	answer(&answered, sizeof(answered));
}

/* A UDP payload's length and as much of it as is in the first buffer, to its header; nothing if it is malformed. */
static void header(struct request *request)
{
	struct quic_header header;
	__u8 *payload;
	__u32 length;

	TAKE(request, length);
	payload = malloc(request->length); /* exactly, so that whoever reads on is caught */
	memcpy(payload, request->octets, request->length);
	if (parse_quic(payload, payload + request->length, length, &header))
		answer("", 0);
	else
		answer(&header, sizeof(header));
	free(payload);
}

/* A checksum, what went and what came, to the new checksum: of a header, and of UDP. */
static void checksum(struct request *request)
{
	__u64 gone, come;
	__u16 answered[2], before;

	TAKE(request, before);
	TAKE(request, gone);
	TAKE(request, come);
	answered[0] = checksum_update(before, gone, come);
	answered[1] = checksum_update_udp(before, gone, come);
	answer(answered, sizeof(answered));
}

static void sum_of_address(struct request *request)
{
	union address address;
	__u16 sum;

	TAKE(request, address);
	sum = checksum_fold(checksum_sum_address(&address));
	answer(&sum, sizeof(sum));
}

/* A 4-tuple, a protocol, a UDP length and the sum of all that a checksum covers besides them, to the checksum. */
static void udp_checksum(struct request *request)
{
	struct flow flow;
	__u32 protocol, length;
	__u16 answered;
	__u64 sum;

	TAKE(request, flow);
	TAKE(request, protocol);
	TAKE(request, length);
	TAKE(request, sum);
	answered = checksum_of_udp(sum + checksum_sum_pseudo_header(&flow, protocol, length));
	answer(&answered, sizeof(answered));
}

/* An IPv4 header to the same with a TTL that is one less; nothing if it has come as far as it may. */
static void hop(struct request *request)
{
	struct iphdr ip;

	TAKE(request, ip);
	if (decrement_ttl(&ip))
		answer("", 0);
	else
		answer(&ip, sizeof(ip));
}

/* Two addresses, protocol, TTL, traffic class and length to an IPv4 header. */
static void ipv4_header(struct request *request)
{
	union address source, destination;
	__u8 protocol, ttl, traffic_class;
	__u32 length;
	struct iphdr ip;

	TAKE(request, source);
	TAKE(request, destination);
	TAKE(request, protocol);
	TAKE(request, ttl);
	TAKE(request, traffic_class);
	TAKE(request, length);
	write_ipv4(&ip, &source, &destination, protocol, ttl, traffic_class, length);
	answer(&ip, sizeof(ip));
}

static void slot_of_ring(struct request *request)
{
	struct flow flow;
	__u64 seed;
	__u32 slot;

	TAKE(request, flow);
	TAKE(request, seed);
	slot = ring_slot(&flow, seed);
	answer(&slot, sizeof(slot));
}

static void serve(char kind, struct request *request)
{
	switch (kind) {
	case 'A': return set_tables(request);
	case 'S': return set_settings(request);
	case 'e': return encrypt(request);
	case 'd': return decrypt(request);
	case 'E': return encrypt_sliced(request);
	case 'D': return decrypt_sliced(request);
	case 'c': return server_id(request);
	case 't': return token(request);
	case 'h': return header(request);
	case 'k': return checksum(request);
	case 'u': return udp_checksum(request);
	case 'i': return hop(request);
	case 'I': return ipv4_header(request);
	case 'r': return slot_of_ring(request);
	case 'a': return sum_of_address(request);
	}
	fprintf(stderr, "no such request: '%c'\n", kind);
	exit(2);
}

int main(void)
{
	struct request request;
	int kind;

	while ((kind = getchar()) != EOF) {
		__u8 *octets;

		if (fread(&request.length, sizeof(request.length), 1, stdin) != 1)
			return 2;
		request.octets = octets = malloc(request.length + 1);
		if (!octets || fread(octets, 1, request.length, stdin) != request.length)
			return 2;
		serve(kind, &request);
		free(octets);
	}
	return 0;
}
