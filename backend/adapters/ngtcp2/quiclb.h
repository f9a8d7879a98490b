/* What makes a server routable: connection IDs that carry its server ID, and their stateless reset tokens.
 *
 * Copy quiclb.h and quiclb.c; they need libyaml and nettle, and know nothing of ngtcp2. The file that a server reads
 * is what `quiclb server-config` writes (docs/configuration.md, "A server"). The draft's sections are those of
 * draft-ietf-quic-load-balancers, the editors' copy after -21.
 */
#ifndef QUICLB_H
#define QUICLB_H

#include <nettle/aes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    QUICLB_MIN_CID = 8,  /* of a server's: those without a configuration have at least that many octets */
    QUICLB_MAX_CID = 20,
    QUICLB_MAX_SERVER_ID = 15,
    QUICLB_MAX_NONCE = 18,
    QUICLB_MAX_BLOCK = 19,
    QUICLB_KEY = 16,
    QUICLB_RESET_KEY = 32,
    QUICLB_TOKEN = 16,
    QUICLB_IDENTITY = 33, /* 32 hex digits and a zero */
    QUICLB_UNROUTABLE = 7,
};

/* Why a file is refused, one line for each mistake. No line holds a key. */
struct quiclb_mistakes {
    size_t count;
    char lines[16][512];
};

/* How connection IDs with one config ID carry a server ID (section 5.3). Lengths in octets. */
struct quiclb_config {
    unsigned config_id;
    unsigned server_id_length;
    unsigned nonce_length;
    unsigned appended_length;
    bool encodes_length;
    bool is_encrypted;
    uint8_t key[QUICLB_KEY];
};

/* The wire format under one configuration. May be shared between threads. */
struct quiclb_codec {
    struct quiclb_config config;
    struct aes128_ctx encrypt, decrypt;
};

void quiclb_codec_init(struct quiclb_codec *codec, const struct quiclb_config *config);
size_t quiclb_codec_length(const struct quiclb_config *config);
/* Writes a connection ID of quiclb_codec_length() octets. `low_bits` fill the five low bits of the first octet if it
 * does not encode the length. */
void quiclb_encode(const struct quiclb_codec *codec, const uint8_t *server_id, const uint8_t *nonce, unsigned low_bits,
                   const uint8_t *appended, uint8_t *cid);
/* False if the connection ID is too short or has another config ID. */
bool quiclb_decode(const struct quiclb_codec *codec, const uint8_t *cid, size_t length, uint8_t *server_id,
                   uint8_t *nonce);
/* The four-pass permutation of section 5.4.2, of 2 to 20 octets, in place. */
void quiclb_four_pass(const struct aes128_ctx *aes, uint8_t *text, size_t length);
/* HMAC-SHA256(key, CID)[:16]. */
void quiclb_token(const uint8_t key[QUICLB_RESET_KEY], const uint8_t *cid, size_t length, uint8_t token[QUICLB_TOKEN]);
/* The name of a nonce space in nonce files. */
void quiclb_identity(const struct quiclb_config *config, const uint8_t *server_id, char identity[QUICLB_IDENTITY]);

/* One server: its configuration, its nonces, the configurations it had before. Its functions may be called from any
 * thread; a process that forks opens it in the child. */
struct quiclb;

/* Reads a server's file and the key files it names. NULL, with the reasons, if anything is wrong. */
struct quiclb *quiclb_open(const char *path, struct quiclb_mistakes *mistakes);
/* Reads the file again; connection IDs are made as it says from then on. False, with the reasons, if it is refused:
 * then nothing has changed. */
bool quiclb_reload(struct quiclb *server, struct quiclb_mistakes *mistakes);
void quiclb_close(struct quiclb *server);

/* The name and the server ID in the file; the latter has no octets if there is no configuration. */
void quiclb_name(struct quiclb *server, char name[65]);
size_t quiclb_server_id(struct quiclb *server, uint8_t server_id[QUICLB_MAX_SERVER_ID]);
/* Octets of all connection IDs of this server, as long as it runs. */
size_t quiclb_cid_length(const struct quiclb *server);
/* A connection ID that was never issued before, of quiclb_cid_length() octets. Without a configuration, and when there
 * is no nonce that is certainly fresh, one that balancers route by address (0b111). */
void quiclb_new_cid(struct quiclb *server, uint8_t *cid);
/* The stateless reset token of one of this server's connection IDs. */
void quiclb_token_of(struct quiclb *server, const uint8_t *cid, size_t length, uint8_t token[QUICLB_TOKEN]);
/* Whether `cid` carries this server's ID, and its token is one that a client may know: only then may an unknown
 * connection ID be answered with a Stateless Reset. */
bool quiclb_may_reset(struct quiclb *server, const uint8_t *cid, size_t length);
/* How long a reset is that answers `trigger` octets; 0 if there may be none (RFC 9000, section 10.3.3). */
size_t quiclb_reset_size(size_t trigger);

/* Octets that nobody can predict. */
void quiclb_random(void *octets, size_t length);
/* Reads a file of 1 to `most` keys, lines of 64 hex digits, the newest first. 0, with the reason, if it is refused. */
size_t quiclb_read_keys(const char *path, uint8_t (*keys)[32], size_t most, struct quiclb_mistakes *mistakes);

#endif
