/*
 * Stateless reset tokens (RFC 9000, section 10.3), as lb/reset_scheme.py makes them.
 */
#pragma once
#include "sha256.h"
#include "shared.h"

/* RFC 2104. */
#define INNER_PAD 0x36363636
#define OUTER_PAD 0x5c5c5c5c

#define CID_WORDS (MAX_CID / 4)
#define SHA256_WORDS (SHA256_BLOCK / 4)
#define MESSAGE_BLOCKS 2
#define ONE_BLOCK (SHA256_BLOCK - 9) /* octets of a message that end in its first block, with its end and its length */

/* What is worked on: not on the stack, where all that leads to a reset stands already. */
struct token_work {
	struct sha256_state state;
	struct sha256_block block;
	struct sha256_state inner, outer; /* behind the key pads of HMAC */
	union {
		__u32 words[SHA256_WORDS];
		__u8 octets[SHA256_BLOCK];
	} key; /* of HMAC, as it lies in memory; zeros behind it */
	union {
		__u32 words[MESSAGE_BLOCKS * SHA256_WORDS];
		__u8 octets[MESSAGE_BLOCKS * SHA256_BLOCK];
	} message; /* zeros behind it */
};

/* The state of SHA-256 behind one block: the key under a pad. */
static __always_inline void pad_key(struct token_work *work, __u32 pad)
{
	work->state = sha256_initial_state;
	for (int i = 0; i < SHA256_WORDS; i++)
		work->block.words[i] = bpf_ntohl(work->key.words[i]) ^ pad;
	sha256_compress(&work->state, &work->block);
}

/* verifier: global functions, this and the two below it, because so each is looked at once and not at every call. */
__noinline int set_hmac_key(struct token_work *work)
{
	if (!work)
		return 0; /* verifier: for all it knows */
	pad_key(work, INNER_PAD);
	work->inner = work->state;
	pad_key(work, OUTER_PAD);
	work->outer = work->state;
	return 0;
}

/* Ends the message, of `length` octets, and takes it into the state, which has seen `before` octets. */
__noinline int hash_message(struct token_work *work, __u32 length, __u32 before)
{
	__u32 bits = bpf_htonl(8 * (before + length));

	if (!work || length > MESSAGE_BLOCKS * SHA256_BLOCK - 9)
		return -1; /* verifier: it never is */
	work->message.octets[length] = 0x80;
	if (length <= ONE_BLOCK)
		work->message.words[SHA256_WORDS - 1] = bits;
	else
		work->message.words[2 * SHA256_WORDS - 1] = bits;
	for (int i = 0; i < SHA256_WORDS; i++)
		work->block.words[i] = bpf_ntohl(work->message.words[i]);
	sha256_compress(&work->state, &work->block);
	if (length <= ONE_BLOCK)
		return 0;
	for (int i = 0; i < SHA256_WORDS; i++)
		work->block.words[i] = bpf_ntohl(work->message.words[SHA256_WORDS + i]);
	sha256_compress(&work->state, &work->block);
	return 0;
}

/* HMAC of the message, of `length` octets, into the state. Both hashes began with one block of pad. */
__noinline int hmac_message(struct token_work *work, __u32 length)
{
	if (!work)
		return 0; /* verifier: for all it knows */
	work->state = work->inner;
	hash_message(work, length, SHA256_BLOCK);

	__builtin_memset(&work->block, 0, sizeof(work->block));
	__builtin_memcpy(&work->block, &work->state, sizeof(work->state));
	work->block.words[SHA256_DIGEST / 4] = 0x80000000;
	work->block.words[SHA256_WORDS - 1] = 8 * (SHA256_BLOCK + SHA256_DIGEST);
	work->state = work->outer;
	sha256_compress(&work->state, &work->block);
	return 0;
}

/* The states behind the pads of a key that is the same for every CID. */
static __always_inline void set_kept_key(struct token_work *work, struct reset_key *key)
{
	/*
	 * No barrier here: a processor that reads the states before the flag makes a token that the client does not
	 * know. That reset is lost, and the client's next packet gets another.
	 */
	if (*(volatile __u32 *)&key->is_prepared) {
		__builtin_memcpy(&work->inner, key->inner, sizeof(work->inner));
		__builtin_memcpy(&work->outer, key->outer, sizeof(work->outer));
		return;
	}
	__builtin_memset(&work->key, 0, sizeof(work->key));
	__builtin_memcpy(&work->key, key->key, sizeof(key->key));
	set_hmac_key(work);
	/* CPUs may do this at the same time: they write the same. */
	__builtin_memcpy(key->inner, &work->inner, sizeof(work->inner));
	__builtin_memcpy(key->outer, &work->outer, sizeof(work->outer));
	/* A full barrier: nobody sees the flag before the states. */
	__sync_lock_test_and_set(&key->is_prepared, 1);
}

/* The CID for a message, its suffix behind it, which with its zeros covers what is there in place of a longer CID. */
static __always_inline int hmac_token(struct token_work *work, struct reset_key *key, const __u32 *cid, __u32 length)
{
	__u32 suffix = key->suffix_length;

	if (length > MAX_CID || suffix > RESET_SUFFIX)
		return -1; /* verifier: neither ever is */
	set_kept_key(work, key);
	__builtin_memcpy(&work->message, cid, MAX_CID);
	__builtin_memcpy(&work->message.octets[length], key->suffix, sizeof(key->suffix));
	return hmac_message(work, length + suffix);
}

/* HKDF (RFC 5869) of one block: with the CID for a salt, the key for what is extracted from, the suffix for info. */
static __always_inline int hkdf_token(struct token_work *work, struct reset_key *key, const __u32 *cid, __u32 length)
{
	if (length > MAX_CID || key->key_length > RESET_KEY || key->suffix_length > RESET_SUFFIX)
		return -1; /* verifier: none ever is */
	__builtin_memset(&work->key, 0, sizeof(work->key));
	__builtin_memcpy(&work->key, cid, MAX_CID);
	__builtin_memset(&work->key.octets[length], 0, MAX_CID);
	set_hmac_key(work);
	__builtin_memcpy(&work->message, key->key, sizeof(key->key));
	hmac_message(work, key->key_length);

	__builtin_memset(&work->key, 0, sizeof(work->key));
	for (int i = 0; i < SHA256_DIGEST / 4; i++)
		work->key.words[i] = bpf_htonl(work->state.words[i]);
	set_hmac_key(work);
	__builtin_memset(&work->message, 0, sizeof(work->message));
	__builtin_memcpy(&work->message, key->suffix, sizeof(key->suffix));
	return hmac_message(work, key->suffix_length);
}

/* The key, the CID among as many octets as any CID has, and its length. */
static __always_inline int hash_token(struct token_work *work, struct reset_key *key, const __u32 *cid, __u32 length)
{
	__u32 at = key->key_length;

	if (length > MAX_CID || at > ONE_BLOCK - MAX_CID - 1)
		return -1; /* verifier: neither ever is */
	__builtin_memcpy(&work->message, key->key, sizeof(key->key));
	__builtin_memcpy(&work->message.octets[at], cid, MAX_CID);
	__builtin_memset(&work->message.octets[at + length], 0, MAX_CID);
	work->message.octets[at + MAX_CID] = length;
	work->state = sha256_initial_state;
	return hash_message(work, at + MAX_CID + 1, 0);
}

/*
 * The token of a CID of `length` octets, 1 to MAX_CID. The octets of `cid` behind them may be anything. Words are as
 * they lie in memory, the token's too. Returns 0.
 */
static __noinline int reset_token(struct reset_key *key, const __u32 *cid, __u32 length, struct token_work *work,
				  __u32 *token)
{
	int failed;

	__builtin_memset(&work->message, 0, sizeof(work->message));
	if (key->arithmetic == TOKEN_HKDF)
		failed = hkdf_token(work, key, cid, length);
	else if (key->arithmetic == TOKEN_HASH)
		failed = hash_token(work, key, cid, length);
	else
		failed = hmac_token(work, key, cid, length);
	for (int i = 0; i < RESET_TOKEN / 4; i++)
		token[i] = bpf_htonl(work->state.words[i]);
	return failed;
}
