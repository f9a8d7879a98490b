/*
 * AES-128 on one block, twice: by table lookups, and in bit planes, whose time depends on nothing secret. Key schedules
 * and tables come from lb/xdp/aes128.py.
 *
 * Source: FIPS 197; section numbers are its own. A word of a block is a column of the state, row 0 in its least
 * significant octet.
 */
#pragma once
#include "bpf.h"
#include "shared.h"

#define AES_ROUNDS 10
#define AES_KEY_WORDS (4 * (AES_ROUNDS + 1))
#define AES_SLICED_WORDS (2 * (AES_ROUNDS + 1))

struct block {
	__u32 words[4];
};

/*
 * By table lookups: fast, but where an octet is looked up tells those who share our caches something about the key.
 */

/* What an octet of each row adds to its column: (Inv)SubBytes and (Inv)MixColumns in one. */
struct aes_tables {
	__u32 te[4][256];
	__u32 td[4][256];
	__u8 sbox[256];
	__u8 inverse_sbox[256];
};
_Static_assert(sizeof(struct aes_tables) == 8704, "aes128.py: tables()");

/* Set when the program is loaded. */
const volatile struct aes_tables aes_tables SEC(".rodata.aes");

#define TE __builtin_offsetof(struct aes_tables, te)
#define TD __builtin_offsetof(struct aes_tables, td)
#define SBOX __builtin_offsetof(struct aes_tables, sbox)
#define INVERSE_SBOX __builtin_offsetof(struct aes_tables, inverse_sbox)
#define ROW sizeof(aes_tables.te[0])

/*
 * The sum of table base and index is hidden from the compiler, so that which table it is goes into the offset of the
 * load, which is free. Indices arrive as multiples of the size of an element.
 */
static __always_inline __u32 table_word(const __u8 *tables, __u64 index, const int offset)
{
	const __u8 *element = tables + index;

	barrier_var(element);
	return *(const __u32 *)(element + offset);
}

static __always_inline __u32 table_octet(const __u8 *tables, __u64 index, const int offset)
{
	const __u8 *element = tables + index;

	barrier_var(element);
	return element[offset];
}

/* One column of a round but the last. Its rows come from four columns of the state: that is (Inv)ShiftRows. */
static __always_inline __u32 table_column(const __u8 *tables, const int offset, __u32 column_of_row_0,
					  __u32 column_of_row_1, __u32 column_of_row_2, __u32 column_of_row_3)
{
	return table_word(tables, column_of_row_0 << 2 & 0x3fc, offset) ^
	       table_word(tables, column_of_row_1 >> 6 & 0x3fc, offset + ROW) ^
	       table_word(tables, column_of_row_2 >> 14 & 0x3fc, offset + 2 * ROW) ^
	       table_word(tables, column_of_row_3 >> 22 & 0x3fc, offset + 3 * ROW);
}

/* The last round does not mix columns. */
static __always_inline __u32 table_last_column(const __u8 *tables, const int offset, __u32 column_of_row_0,
					       __u32 column_of_row_1, __u32 column_of_row_2, __u32 column_of_row_3)
{
	return table_octet(tables, column_of_row_0 & 0xff, offset) |
	       table_octet(tables, column_of_row_1 >> 8 & 0xff, offset) << 8 |
	       table_octet(tables, column_of_row_2 >> 16 & 0xff, offset) << 16 |
	       table_octet(tables, column_of_row_3 >> 24, offset) << 24;
}

/*
 * The cipher (section 5.1) and the equivalent inverse cipher (section 5.3.5) differ in their tables and in the way that
 * rows are shifted, to the left or to the right: that is, in which column is the `second` and which the `fourth`.
 */
static __always_inline void table_rounds(const __u32 *key, struct block *block, const int table, const int sbox,
					 const int second, const int fourth)
{
	const __u8 *tables = (const __u8 *)&aes_tables;
	__u32 a = block->words[0] ^ key[0];
	__u32 b = block->words[second] ^ key[second];
	__u32 c = block->words[2] ^ key[2];
	__u32 d = block->words[fourth] ^ key[fourth];

	barrier_var(tables);
#pragma unroll
	for (int i = 4; i < 4 * AES_ROUNDS; i += 4) {
		__u32 next_a = table_column(tables, table, a, b, c, d) ^ key[i];
		__u32 next_b = table_column(tables, table, b, c, d, a) ^ key[i + second];
		__u32 next_c = table_column(tables, table, c, d, a, b) ^ key[i + 2];
		__u32 next_d = table_column(tables, table, d, a, b, c) ^ key[i + fourth];

		a = next_a;
		b = next_b;
		c = next_c;
		d = next_d;
	}
	key += 4 * AES_ROUNDS;
	block->words[0] = table_last_column(tables, sbox, a, b, c, d) ^ key[0];
	block->words[second] = table_last_column(tables, sbox, b, c, d, a) ^ key[second];
	block->words[2] = table_last_column(tables, sbox, c, d, a, b) ^ key[2];
	block->words[fourth] = table_last_column(tables, sbox, d, a, b, c) ^ key[fourth];
}

/* `key` has AES_KEY_WORDS words. */
static __always_inline void aes128_encrypt(const __u32 *key, struct block *block)
{
	table_rounds(key, block, TE, SBOX, 1, 3);
}

/* `key` is the schedule of the inverse cipher. */
static __always_inline void aes128_decrypt(const __u32 *key, struct block *block)
{
	table_rounds(key, block, TD, INVERSE_SBOX, 3, 1);
}

/*
 * In bit planes: nothing secret is an address or decides a branch.
 */

/*
 * The state as eight planes of 16 bits: plane i has bit i of every octet, the octet in `row` and `column` at
 * 4 * row + column. Planes 0 to 3 are in `low`, plane 0 in the least significant bits, and 4 to 7 in `high`.
 */
struct planes {
	__u64 low;
	__u64 high;
};

/* 16 bits in each of the four planes of a word. */
#define EACH_PLANE(bits) ((__u64)(bits) * 0x0001000100010001)

/* Swap the bits under `mask` with those `distance` above them. */
static __always_inline __u64 swap_bits(__u64 x, int distance, __u64 mask)
{
	__u64 differences = (x ^ x >> distance) & mask;

	return x ^ differences ^ differences << distance;
}

/* An 8 by 8 matrix of bits, mirrored: octet i gets bit i of every octet. */
static __always_inline __u64 transpose_bits(__u64 x)
{
	x = swap_bits(x, 7, 0x00aa00aa00aa00aa);
	x = swap_bits(x, 14, 0x0000cccc0000cccc);
	return swap_bits(x, 28, 0x00000000f0f0f0f0);
}

/* Octets 4 * column + row of two words to octets 4 * row + column of them, and back. */
static __always_inline void transpose_octets(__u64 *first, __u64 *second)
{
	__u64 differences;

	*first = swap_bits(*first, 24, 0x00000000ff00ff00);
	*second = swap_bits(*second, 24, 0x00000000ff00ff00);
	differences = (*first >> 16 ^ *second) & 0x0000ffff0000ffff;
	*second ^= differences;
	*first ^= differences << 16;
}

/* Four octets to the low halves of the lanes of a word, and back. */
static __always_inline __u64 spread(__u64 octets)
{
	octets = (octets | octets << 16) & 0x0000ffff0000ffff;
	return (octets | octets << 8) & 0x00ff00ff00ff00ff;
}

static __always_inline __u64 gather(__u64 lanes)
{
	lanes &= 0x00ff00ff00ff00ff;
	lanes = (lanes | lanes >> 8) & 0x0000ffff0000ffff;
	return (lanes | lanes >> 16) & 0xffffffff;
}

static __always_inline struct planes planes_of(const struct block *block)
{
	__u64 rows_0_1 = block->words[0] | (__u64)block->words[1] << 32;
	__u64 rows_2_3 = block->words[2] | (__u64)block->words[3] << 32;

	transpose_octets(&rows_0_1, &rows_2_3);
	rows_0_1 = transpose_bits(rows_0_1);
	rows_2_3 = transpose_bits(rows_2_3);
	return (struct planes){
		.low = spread(rows_0_1 & 0xffffffff) | spread(rows_2_3 & 0xffffffff) << 8,
		.high = spread(rows_0_1 >> 32) | spread(rows_2_3 >> 32) << 8,
	};
}

static __always_inline struct block block_of(struct planes state)
{
	__u64 rows_0_1 = transpose_bits(gather(state.low) | gather(state.high) << 32);
	__u64 rows_2_3 = transpose_bits(gather(state.low >> 8) | gather(state.high >> 8) << 32);

	transpose_octets(&rows_0_1, &rows_2_3);
	return (struct block){ { rows_0_1, rows_0_1 >> 32, rows_2_3, rows_2_3 >> 32 } };
}

/*
 * SubBytes of all octets at once: the circuit of Boyar and Peralta, "A New Combinational Logic Minimization Technique
 * with Applications to Cryptology" (SEA 2010, eprint 2009/191). Names are theirs, so bit 0 is the most significant one.
 */
static __always_inline struct planes sub_bytes(struct planes state)
{
	__u64 x7 = state.low, x6 = state.low >> 16, x5 = state.low >> 32, x4 = state.low >> 48;
	__u64 x3 = state.high, x2 = state.high >> 16, x1 = state.high >> 32, x0 = state.high >> 48;

	/* To a tower of fields, in which inversion is cheap. */
	__u64 y14 = x3 ^ x5, y13 = x0 ^ x6, y9 = x0 ^ x3, y8 = x0 ^ x5, t0 = x1 ^ x2;
	__u64 y1 = t0 ^ x7, y4 = y1 ^ x3, y12 = y13 ^ y14, y2 = y1 ^ x0, y5 = y1 ^ x6;
	__u64 y3 = y5 ^ y8, t1 = x4 ^ y12, y15 = t1 ^ x5, y20 = t1 ^ x1, y6 = y15 ^ x7;
	__u64 y10 = y15 ^ t0, y11 = y20 ^ y9, y7 = x7 ^ y11, y17 = y10 ^ y11, y19 = y10 ^ y8;
	__u64 y16 = t0 ^ y11, y21 = y13 ^ y16, y18 = x0 ^ y16;

	/* The norm, its inverse, */
	__u64 t2 = y12 & y15, t3 = y3 & y6, t4 = t3 ^ t2, t5 = y4 & x7, t6 = t5 ^ t2;
	__u64 t7 = y13 & y16, t8 = y5 & y1, t9 = t8 ^ t7, t10 = y2 & y7, t11 = t10 ^ t7;
	__u64 t12 = y9 & y11, t13 = y14 & y17, t14 = t13 ^ t12, t15 = y8 & y10, t16 = t15 ^ t12;
	__u64 t17 = t4 ^ t14, t18 = t6 ^ t16, t19 = t9 ^ t14, t20 = t11 ^ t16;
	__u64 t21 = t17 ^ y20, t22 = t18 ^ y19, t23 = t19 ^ y21, t24 = t20 ^ y18;
	__u64 t25 = t21 ^ t22, t26 = t21 & t23, t27 = t24 ^ t26, t28 = t25 & t27, t29 = t28 ^ t22;
	__u64 t30 = t23 ^ t24, t31 = t22 ^ t26, t32 = t31 & t30, t33 = t32 ^ t24, t34 = t23 ^ t33;
	__u64 t35 = t27 ^ t33, t36 = t24 & t35, t37 = t36 ^ t34, t38 = t27 ^ t36, t39 = t29 & t38;
	__u64 t40 = t25 ^ t39, t41 = t40 ^ t37, t42 = t29 ^ t33, t43 = t29 ^ t40, t44 = t33 ^ t37;
	__u64 t45 = t42 ^ t41;

	/* and the products that make it the inverse of the octet. */
	__u64 z0 = t44 & y15, z1 = t37 & y6, z2 = t33 & x7, z3 = t43 & y16, z4 = t40 & y1, z5 = t29 & y7;
	__u64 z6 = t42 & y11, z7 = t45 & y17, z8 = t41 & y10, z9 = t44 & y12, z10 = t37 & y3, z11 = t33 & y4;
	__u64 z12 = t43 & y13, z13 = t40 & y5, z14 = t29 & y2, z15 = t42 & y9, z16 = t45 & y14, z17 = t41 & y8;

	/* Back, and the affine map. */
	__u64 t46 = z15 ^ z16, t47 = z10 ^ z11, t48 = z5 ^ z13, t49 = z9 ^ z10, t50 = z2 ^ z12;
	__u64 t51 = z2 ^ z5, t52 = z7 ^ z8, t53 = z0 ^ z3, t54 = z6 ^ z7, t55 = z16 ^ z17;
	__u64 t56 = z12 ^ t48, t57 = t50 ^ t53, t58 = z4 ^ t46, t59 = z3 ^ t54, t60 = t46 ^ t57;
	__u64 t61 = z14 ^ t57, t62 = t52 ^ t58, t63 = t49 ^ t58, t64 = z4 ^ t59, t65 = t61 ^ t62;
	__u64 t66 = z1 ^ t63, t67 = t64 ^ t65;
	__u64 s0 = t59 ^ t63, s6 = t56 ^ ~t62, s7 = t48 ^ ~t60, s3 = t53 ^ t66, s4 = t51 ^ t66;
	__u64 s5 = t47 ^ t65, s1 = t64 ^ ~s3, s2 = t55 ^ ~t67;

	return (struct planes){
		.low = (s7 & 0xffff) | (s6 & 0xffff) << 16 | (s5 & 0xffff) << 32 | s4 << 48,
		.high = (s3 & 0xffff) | (s2 & 0xffff) << 16 | (s1 & 0xffff) << 32 | s0 << 48,
	};
}

/* The inverse of SubBytes' affine map: bit i becomes the sum of bits i + 2, i + 5, i + 7 (modulo 8) and of 0x05. */
static __always_inline struct planes inverse_affine(struct planes state)
{
	__u64 low = state.low, high = state.high;

	return (struct planes){
		.low = (low >> 32 | high << 32) ^ (high >> 16 | low << 48) ^ (high >> 48 | low << 16) ^
		       0x0000ffff0000ffff,
		.high = (high >> 32 | low << 32) ^ (low >> 16 | high << 48) ^ (low >> 48 | high << 16),
	};
}

/* S is the affine map A of the inverse I, and I is its own inverse: S^-1 = I A^-1 = A^-1 S A^-1. */
static __always_inline struct planes inverse_sub_bytes(struct planes state)
{
	return inverse_affine(sub_bytes(inverse_affine(state)));
}

static __always_inline __u64 shift_rows(__u64 x)
{
	return (x & EACH_PLANE(0x000f)) | /* row 1 by one column: */
	       (x >> 1 & EACH_PLANE(0x0070)) | (x << 3 & EACH_PLANE(0x0080)) | /* row 2 by two: */
	       (x >> 2 & EACH_PLANE(0x0300)) | (x << 2 & EACH_PLANE(0x0c00)) | /* row 3 by three: */
	       (x >> 3 & EACH_PLANE(0x1000)) | (x << 1 & EACH_PLANE(0xe000));
}

static __always_inline __u64 inverse_shift_rows(__u64 x)
{
	return (x & EACH_PLANE(0x000f)) | /* row 1 by one column: */
	       (x << 1 & EACH_PLANE(0x00e0)) | (x >> 3 & EACH_PLANE(0x0010)) | /* row 2 by two: */
	       (x << 2 & EACH_PLANE(0x0c00)) | (x >> 2 & EACH_PLANE(0x0300)) | /* row 3 by three: */
	       (x << 3 & EACH_PLANE(0x8000)) | (x >> 1 & EACH_PLANE(0x7000));
}

/* To every row what is one row, or two rows, below it. */
static __always_inline __u64 row_below(__u64 x)
{
	return (x >> 4 & EACH_PLANE(0x0fff)) | (x << 12 & EACH_PLANE(0xf000));
}

static __always_inline __u64 two_rows_below(__u64 x)
{
	return (x >> 8 & EACH_PLANE(0x00ff)) | (x << 8 & EACH_PLANE(0xff00));
}

/* Every octet times two: plane i to plane i + 1, and what leaves plane 7 to 0, 1, 3 and 4 (the polynomial 0x11b). */
static __always_inline struct planes twice(struct planes state)
{
	__u64 carry = state.high >> 48;

	return (struct planes){
		.low = state.low << 16 ^ (carry | carry << 16 | carry << 48),
		.high = (state.high << 16 | state.low >> 48) ^ carry,
	};
}

/* Row r becomes 2 (r + (r + 1)) + (r + 1) + (r + 2) + (r + 3). */
static __always_inline struct planes mix_columns(struct planes state)
{
	struct planes below = { row_below(state.low), row_below(state.high) };
	struct planes sum = { state.low ^ below.low, state.high ^ below.high };
	struct planes doubled = twice(sum);

	return (struct planes){
		.low = doubled.low ^ below.low ^ two_rows_below(sum.low),
		.high = doubled.high ^ below.high ^ two_rows_below(sum.high),
	};
}

/* {14, 11, 13, 9} = {2, 3, 1, 1} {5, 0, 4, 0}: first add 4 (r + (r + 2)) to row r. */
static __always_inline struct planes inverse_mix_columns(struct planes state)
{
	struct planes sum = {
		state.low ^ two_rows_below(state.low),
		state.high ^ two_rows_below(state.high),
	};

	sum = twice(twice(sum));
	return mix_columns((struct planes){ state.low ^ sum.low, state.high ^ sum.high });
}

static __always_inline struct planes add_round_key(struct planes state, const __u64 *key, int round)
{
	return (struct planes){ state.low ^ key[2 * round], state.high ^ key[2 * round + 1] };
}

/* Section 5.1; `key` has AES_SLICED_WORDS words. */
static __always_inline void aes128_encrypt_sliced(const __u64 *key, struct block *block)
{
	struct planes state = add_round_key(planes_of(block), key, 0);

#pragma nounroll
	for (int i = 1; i <= AES_ROUNDS; i++) {
		state = sub_bytes(state);
		state.low = shift_rows(state.low);
		state.high = shift_rows(state.high);
		if (i < AES_ROUNDS)
			state = mix_columns(state);
		state = add_round_key(state, key, i);
	}
	*block = block_of(state);
}

/* Section 5.3, with the key schedule of encryption. */
static __always_inline void aes128_decrypt_sliced(const __u64 *key, struct block *block)
{
	struct planes state = add_round_key(planes_of(block), key, AES_ROUNDS);

#pragma nounroll
	for (int i = AES_ROUNDS - 1; i >= 0; i--) {
		state.low = inverse_shift_rows(state.low);
		state.high = inverse_shift_rows(state.high);
		state = inverse_sub_bytes(state);
		state = add_round_key(state, key, i);
		if (i > 0)
			state = inverse_mix_columns(state);
	}
	*block = block_of(state);
}
