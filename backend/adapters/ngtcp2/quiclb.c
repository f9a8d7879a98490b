/* See quiclb.h. */
#define _GNU_SOURCE
#include "quiclb.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <nettle/hmac.h>
#include <nettle/memops.h>
#include <nettle/sha2.h>
#include <pthread.h>
#include <regex.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>
#include <yaml.h>

enum {
    MAX_FILE = 4 << 20,        /* octets of a server's file */
    MAX_MARKS_FILE = 16 << 20, /* octets of a nonce file */
    MAX_KEY_FILE = 1024,       /* octets of a key file; eight keys take 520 */
    MAX_SHOWN = 60,            /* characters of a text in a message */
    BLOCK = 1 << 16,           /* nonces per reservation: one durable write, and at most as many lost in a crash */
    RETRY_EVERY = 64,          /* connection IDs between two attempts at a nonce file that cannot be written */
    CONFIG_IDS = 7,
    DIGITS = 48, /* of a number below 2**144 */
    MIN_RESET = 21,
    INCONSPICUOUS = 42, /* below this a reset can be told from a data packet */
    MAX_RESET = 100,
};

static const char FORMAT[] = "quiclb nonce marks 1";

/* Small things. */

void quiclb_random(void *octets, size_t length)
{
    uint8_t *at = octets;
    while (length > 0) {
        ssize_t got = getrandom(at, length < 256 ? length : 256, 0);
        if (got < 0 && errno != EINTR)
            abort(); /* a connection ID or a key that somebody can guess would be worse */
        if (got > 0) {
            at += got;
            length -= (size_t)got;
        }
    }
}

static void mistake(struct quiclb_mistakes *mistakes, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void mistake(struct quiclb_mistakes *mistakes, const char *format, ...)
{
    if (mistakes->count == sizeof mistakes->lines / sizeof mistakes->lines[0])
        return;
    char *line = mistakes->lines[mistakes->count++];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof mistakes->lines[0], format, arguments);
    va_end(arguments);
    for (; *line; line++)
        if (!isprint((unsigned char)*line))
            *line = '?';
}

/* A text as a message quotes it: not too long, and without anything that looks like a key. */
static const char *shown(const char *text, char buffer[MAX_SHOWN + 4])
{
    size_t length = strlen(text);
    for (size_t i = 0, run = 0; i < length; i++) {
        run = isxdigit((unsigned char)text[i]) ? run + 1 : 0;
        if (run == 32)
            return "a text with a long run of hex digits";
    }
    snprintf(buffer, MAX_SHOWN + 4, length > MAX_SHOWN ? "%.*s..." : "%.*s", MAX_SHOWN, text);
    return buffer;
}

static void to_hex(const uint8_t *octets, size_t length, char *digits)
{
    for (size_t i = 0; i < length; i++)
        snprintf(digits + 2 * i, 3, "%02x", octets[i]);
    digits[2 * length] = 0;
}

static bool from_hex(const char *digits, size_t count, uint8_t *octets)
{
    for (size_t i = 0; i < count; i++) {
        if (!isxdigit((unsigned char)digits[i]))
            return false;
        unsigned value = (unsigned)(isdigit((unsigned char)digits[i]) ? digits[i] - '0'
                                                                      : tolower((unsigned char)digits[i]) - 'a' + 10);
        octets[i / 2] = (uint8_t)(i % 2 ? octets[i / 2] | value : value << 4);
    }
    return count % 2 == 0;
}

/* The first octets of an open file, up to `most`, with a zero behind them. NULL, and errno, if it cannot be read. */
static char *contents(int file, size_t most, size_t *length)
{
    char *text = malloc(most + 1);
    if (!text)
        return NULL;
    *length = 0;
    while (*length < most) {
        ssize_t got = read(file, text + *length, most - *length);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            int error = errno;
            free(text);
            errno = error;
            return NULL;
        }
        if (got == 0)
            break;
        *length += (size_t)got;
    }
    text[*length] = 0;
    return text;
}

/* Opens a file that is nobody else's business and reads it. NULL, with the reason, if that cannot be. */
static char *private_contents(const char *path, const char *expected, size_t most, size_t *length,
                              struct quiclb_mistakes *mistakes)
{
    struct stat status;
    int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC); /* opening a pipe would wait for ever */
    if (file < 0 || fstat(file, &status) < 0) {
        mistake(mistakes, "%s: cannot be read: %s", path, strerror(errno));
        if (file >= 0)
            close(file);
        return NULL;
    }
    char *text = NULL;
    if (!S_ISREG(status.st_mode))
        mistake(mistakes, "%s: not a regular file: expected a file with %s", path, expected);
    else if (status.st_mode & S_IRWXO)
        mistake(mistakes, "%s: mode %04o lets everybody at it: expected 0600 or 0640", path, status.st_mode & 07777u);
    else if (!(text = contents(file, most, length)))
        mistake(mistakes, "%s: cannot be read: %s", path, strerror(errno));
    close(file);
    return text;
}

size_t quiclb_read_keys(const char *path, uint8_t (*keys)[32], size_t most, struct quiclb_mistakes *mistakes)
{
    size_t length, count = 0;
    char expected[64];
    snprintf(expected, sizeof expected, "1 to %zu lines of 64 hex digits", most);
    char *text = private_contents(path, expected, MAX_KEY_FILE, &length, mistakes);
    if (!text)
        return 0;
    char *rest = text, *line;
    while ((line = strsep(&rest, "\n"))) {
        line[strcspn(line, "\r \t")] = 0;
        if (!*line)
            continue;
        if (count == most || strlen(line) != 64 || !from_hex(line, 64, keys[count])) {
            count = 0;
            break;
        }
        count++;
    }
    if (count == 0)
        mistake(mistakes, "%s: holds something else: expected %s", path, expected);
    explicit_bzero(text, length);
    free(text);
    return count;
}

static bool read_key(const char *path, uint8_t *key, size_t length, struct quiclb_mistakes *mistakes)
{
    size_t got;
    char expected[64];
    snprintf(expected, sizeof expected, "%zu hex digits (%zu octets)", 2 * length, length);
    char *text = private_contents(path, expected, MAX_KEY_FILE, &got, mistakes);
    if (!text)
        return false;
    char *begin = text + strspn(text, " \t\r\n");
    size_t digits = strlen(begin);
    while (digits > 0 && isspace((unsigned char)begin[digits - 1]))
        digits--;
    bool is_good = digits == 2 * length && from_hex(begin, digits, key);
    if (digits != 2 * length)
        mistake(mistakes, "%s: holds %zu characters: expected %s", path, digits, expected);
    else if (!is_good)
        mistake(mistakes, "%s: holds something else than hex digits: expected %s", path, expected);
    explicit_bzero(text, got);
    free(text);
    return is_good;
}

/* The wire format. */

size_t quiclb_codec_length(const struct quiclb_config *config)
{
    return 1 + config->server_id_length + config->nonce_length + config->appended_length;
}

void quiclb_codec_init(struct quiclb_codec *codec, const struct quiclb_config *config)
{
    codec->config = *config;
    aes128_set_encrypt_key(&codec->encrypt, config->key);
    aes128_invert_key(&codec->decrypt, &codec->encrypt);
}

/* Section 5.4.2: halves of 4 * length bits. Those of an odd length share the middle octet: the left one has its high
 * nibble, the right one its low nibble. */
struct halves {
    uint8_t left[QUICLB_MAX_CID / 2], right[QUICLB_MAX_CID / 2];
    size_t length, size; /* of the whole text, and of one half, in octets */
};

static struct halves split(const uint8_t *text, size_t length)
{
    struct halves halves = {.length = length, .size = (length + 1) / 2};
    memcpy(halves.left, text, halves.size);
    memcpy(halves.right, text + length - halves.size, halves.size);
    if (length % 2) {
        halves.left[halves.size - 1] &= 0xf0;
        halves.right[0] &= 0x0f;
    }
    return halves;
}

static void join(const struct halves *halves, uint8_t *text)
{
    uint8_t middle = halves->left[halves->size - 1];
    memcpy(text, halves->left, halves->size);
    memcpy(text + halves->length - halves->size, halves->right, halves->size);
    if (halves->length % 2)
        text[halves->size - 1] |= middle;
}

static void pass(const struct aes128_ctx *aes, struct halves *halves, unsigned number)
{
    bool is_from_left = number % 2;
    uint8_t block[AES_BLOCK_SIZE] = {0};
    memcpy(block, is_from_left ? halves->left : halves->right, halves->size);
    block[AES_BLOCK_SIZE - 2] = (uint8_t)halves->length;
    block[AES_BLOCK_SIZE - 1] = (uint8_t)number;
    aes128_encrypt(aes, AES_BLOCK_SIZE, block, block);
    if (halves->length % 2) {
        if (is_from_left)
            block[0] &= 0x0f;
        else
            block[halves->size - 1] &= 0xf0;
    }
    memxor(is_from_left ? halves->right : halves->left, block, halves->size);
}

void quiclb_four_pass(const struct aes128_ctx *aes, uint8_t *text, size_t length)
{
    struct halves halves = split(text, length);
    for (unsigned number = 1; number <= 4; number++)
        pass(aes, &halves, number);
    join(&halves, text);
}

static void four_pass_back(const struct aes128_ctx *aes, uint8_t *text, size_t length)
{
    struct halves halves = split(text, length);
    for (unsigned number = 4; number >= 1; number--)
        pass(aes, &halves, number);
    join(&halves, text);
}

void quiclb_encode(const struct quiclb_codec *codec, const uint8_t *server_id, const uint8_t *nonce, unsigned low_bits,
                   const uint8_t *appended, uint8_t *cid)
{
    const struct quiclb_config *config = &codec->config;
    size_t block = config->server_id_length + config->nonce_length;
    unsigned low = config->encodes_length ? (unsigned)quiclb_codec_length(config) - 1 : low_bits & 0x1f;
    cid[0] = (uint8_t)(config->config_id << 5 | low);
    memcpy(cid + 1, server_id, config->server_id_length);
    memcpy(cid + 1 + config->server_id_length, nonce, config->nonce_length);
    if (config->appended_length > 0)
        memcpy(cid + 1 + block, appended, config->appended_length);
    if (config->is_encrypted && block == AES_BLOCK_SIZE)
        aes128_encrypt(&codec->encrypt, AES_BLOCK_SIZE, cid + 1, cid + 1);
    else if (config->is_encrypted)
        quiclb_four_pass(&codec->encrypt, cid + 1, block);
}

bool quiclb_decode(const struct quiclb_codec *codec, const uint8_t *cid, size_t length, uint8_t *server_id,
                   uint8_t *nonce)
{
    const struct quiclb_config *config = &codec->config;
    size_t block = config->server_id_length + config->nonce_length;
    uint8_t text[QUICLB_MAX_BLOCK];
    if (length < 1 + block || cid[0] >> 5 != config->config_id)
        return false;
    memcpy(text, cid + 1, block);
    if (config->is_encrypted && block == AES_BLOCK_SIZE)
        aes128_decrypt(&codec->decrypt, AES_BLOCK_SIZE, text, text);
    else if (config->is_encrypted)
        four_pass_back(&codec->encrypt, text, block);
    memcpy(server_id, text, config->server_id_length);
    memcpy(nonce, text + config->server_id_length, config->nonce_length);
    return true;
}

void quiclb_token(const uint8_t key[QUICLB_RESET_KEY], const uint8_t *cid, size_t length, uint8_t token[QUICLB_TOKEN])
{
    struct hmac_sha256_ctx hmac;
    hmac_sha256_set_key(&hmac, QUICLB_RESET_KEY, key);
    hmac_sha256_update(&hmac, length, cid);
    hmac_sha256_digest(&hmac, QUICLB_TOKEN, token);
}

size_t quiclb_reset_size(size_t trigger)
{
    if (trigger <= MIN_RESET)
        return 0;
    if (trigger <= INCONSPICUOUS + 1)
        return trigger - 1;
    size_t largest = trigger - 1 < MAX_RESET ? trigger - 1 : MAX_RESET;
    uint16_t random;
    quiclb_random(&random, sizeof random);
    return INCONSPICUOUS + random % (largest - INCONSPICUOUS + 1);
}

/* A configuration's name in nonce files tells no key. It has no config ID if there is a key: configurations that share
 * key and server ID share nonces (section 9.6). */
void quiclb_identity(const struct quiclb_config *config, const uint8_t *server_id, char identity[QUICLB_IDENTITY])
{
    static const char encrypted[] = "quiclb nonces", plaintext[] = "quiclb plaintext nonces";
    uint8_t space[2 + QUICLB_MAX_SERVER_ID] = {(uint8_t)config->server_id_length, (uint8_t)config->nonce_length};
    uint8_t digest[16];
    size_t length = 2 + config->server_id_length;
    memcpy(space + 2, server_id, config->server_id_length);
    if (config->is_encrypted) {
        struct hmac_sha256_ctx hmac;
        hmac_sha256_set_key(&hmac, QUICLB_KEY, config->key);
        hmac_sha256_update(&hmac, sizeof encrypted - 1, (const uint8_t *)encrypted);
        hmac_sha256_update(&hmac, length, space);
        hmac_sha256_digest(&hmac, sizeof digest, digest);
    } else {
        struct sha256_ctx sha;
        uint8_t config_id = (uint8_t)config->config_id;
        sha256_init(&sha);
        sha256_update(&sha, sizeof plaintext - 1, (const uint8_t *)plaintext);
        sha256_update(&sha, 1, &config_id);
        sha256_update(&sha, length, space);
        sha256_digest(&sha, sizeof digest, digest);
    }
    to_hex(digest, sizeof digest, identity);
}

/* Numbers of up to 144 bits, big-endian, and their decimal digits. */

struct number {
    uint8_t octets[QUICLB_MAX_NONCE];
};

/* number = number * 10 + digit; false if it does not fit. */
static bool append_digit(struct number *number, unsigned digit)
{
    unsigned carry = digit;
    for (size_t i = QUICLB_MAX_NONCE; i-- > 0;) {
        carry += number->octets[i] * 10u;
        number->octets[i] = (uint8_t)carry;
        carry >>= 8;
    }
    return carry == 0;
}

static bool parse_number(const char *digits, struct number *number)
{
    memset(number, 0, sizeof *number);
    if (!*digits || (digits[0] == '0' && digits[1]))
        return false;
    for (; *digits; digits++)
        if (!isdigit((unsigned char)*digits) || !append_digit(number, (unsigned)(*digits - '0')))
            return false;
    return true;
}

static void print_number(const struct number *number, char digits[DIGITS])
{
    struct number rest = *number;
    char backwards[DIGITS];
    size_t count = 0;
    bool is_zero;
    do {
        unsigned remainder = 0;
        is_zero = true;
        for (size_t i = 0; i < QUICLB_MAX_NONCE; i++) {
            remainder = remainder << 8 | rest.octets[i];
            rest.octets[i] = (uint8_t)(remainder / 10);
            remainder %= 10;
            is_zero &= rest.octets[i] == 0;
        }
        backwards[count++] = (char)('0' + remainder);
    } while (!is_zero);
    for (size_t i = 0; i < count; i++)
        digits[i] = backwards[count - 1 - i];
    digits[count] = 0;
}

/* Whether a number has at most that many octets. */
static bool fits(const struct number *number, size_t octets)
{
    for (size_t i = 0; i + octets < QUICLB_MAX_NONCE; i++)
        if (number->octets[i])
            return false;
    return true;
}

static void add(struct number *number, uint64_t addend)
{
    for (size_t i = QUICLB_MAX_NONCE; i-- > 0 && addend > 0;) {
        uint64_t sum = number->octets[i] + (addend & 0xff);
        number->octets[i] = (uint8_t)sum;
        addend = (addend >> 8) + (sum >> 8);
    }
}

/* Nonce marks: one small file that says which nonces are spent, in the format of quiclb's own (lb/highwater.py).
 * Nonces `start` to `start + reserved - 1` are. Numbers are kept as they are written. */

struct mark {
    char identity[QUICLB_IDENTITY];
    char start[DIGITS], reserved[DIGITS];
    char permutation_key[2 * QUICLB_KEY + 1];
};

struct marks {
    char *path;
    int lock;
    struct mark *table; /* sorted by identity */
    size_t count;
};

static int by_identity(const void *one, const void *other)
{
    return strcmp(((const struct mark *)one)->identity, ((const struct mark *)other)->identity);
}

/* Appends to a text that grows. False if there is no memory. */
struct growing {
    char *text;
    size_t length, room;
};

static bool append(struct growing *growing, const char *format, ...) __attribute__((format(printf, 2, 3)));

static bool append(struct growing *growing, const char *format, ...)
{
    char piece[256];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(piece, sizeof piece, format, arguments);
    va_end(arguments);
    if (length < 0 || (size_t)length >= sizeof piece)
        return false;
    if (growing->length + (size_t)length + 1 > growing->room) {
        size_t room = 2 * growing->room + sizeof piece;
        char *text = realloc(growing->text, room);
        if (!text)
            return false;
        growing->text = text;
        growing->room = room;
    }
    memcpy(growing->text + growing->length, piece, (size_t)length + 1);
    growing->length += (size_t)length;
    return true;
}

/* The table as JSON. The short form is what the digest is of. */
static bool print_table(const struct marks *marks, bool is_short, struct growing *out)
{
    const char *line = is_short ? "%s\"%s\":{\"permutation_key\":\"%s\",\"reserved\":%s,\"start\":%s}"
                                : "%s\n  \"%s\": {\"permutation_key\": \"%s\", \"reserved\": %s, \"start\": %s}";
    bool is_good = append(out, "{");
    for (size_t i = 0; i < marks->count && is_good; i++) {
        const struct mark *mark = &marks->table[i];
        is_good = append(out, line, i ? "," : "", mark->identity, mark->permutation_key, mark->reserved, mark->start);
    }
    return is_good && append(out, "}");
}

static bool digest_table(const struct marks *marks, char digits[2 * SHA256_DIGEST_SIZE + 1])
{
    struct growing text = {0};
    uint8_t digest[SHA256_DIGEST_SIZE];
    struct sha256_ctx sha;
    bool is_good = print_table(marks, true, &text);
    if (is_good) {
        sha256_init(&sha);
        sha256_update(&sha, text.length, (const uint8_t *)text.text);
        sha256_digest(&sha, sizeof digest, digest);
        to_hex(digest, sizeof digest, digits);
    }
    free(text.text);
    return is_good;
}

/* Writes the file whole and renames it into place. False, and errno, if it is not durable. */
static bool save_marks(const struct marks *marks)
{
    char digits[2 * SHA256_DIGEST_SIZE + 1], *temporary = NULL;
    struct growing text = {0};
    int file = -1;
    bool is_good = digest_table(marks, digits) &&
                   append(&text, "{\n \"format\": \"%s\",\n \"sha256\": \"%s\",\n \"marks\": ", FORMAT, digits) &&
                   print_table(marks, false, &text) && append(&text, "\n}\n") &&
                   asprintf(&temporary, "%s.new", marks->path) >= 0;
    if (is_good) {
        file = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
        is_good = file >= 0 && fchmod(file, 0600) == 0;
        for (size_t at = 0; is_good && at < text.length;) {
            ssize_t written = write(file, text.text + at, text.length - at);
            is_good = written > 0 || (written < 0 && errno == EINTR);
            at += written > 0 ? (size_t)written : 0;
        }
        is_good = is_good && fsync(file) == 0;
        if (file >= 0)
            is_good = close(file) == 0 && is_good;
        is_good = is_good && rename(temporary, marks->path) == 0;
    }
    if (is_good) {
        char *slash = strrchr(marks->path, '/');
        char *parent = slash ? strndup(marks->path, (size_t)(slash - marks->path) + 1) : strdup(".");
        int directory = parent ? open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
        is_good = directory >= 0 && fsync(directory) == 0;
        if (directory >= 0)
            close(directory);
        free(parent);
    }
    explicit_bzero(text.text, text.text ? text.length : 0);
    free(text.text);
    free(temporary);
    return is_good;
}

static const char *member(yaml_document_t *document, const yaml_node_t *mapping, const char *key, yaml_node_t **node)
{
    if (!mapping || mapping->type != YAML_MAPPING_NODE)
        return NULL;
    for (const yaml_node_pair_t *pair = mapping->data.mapping.pairs.start; pair < mapping->data.mapping.pairs.top;
         pair++) {
        const yaml_node_t *name = yaml_document_get_node(document, pair->key);
        yaml_node_t *value = yaml_document_get_node(document, pair->value);
        if (name->type == YAML_SCALAR_NODE && strcmp((const char *)name->data.scalar.value, key) == 0) {
            if (node)
                *node = value;
            return value->type == YAML_SCALAR_NODE ? (const char *)value->data.scalar.value : NULL;
        }
    }
    return NULL;
}

static bool copy_text(const char *text, char *into, size_t room)
{
    if (!text || strlen(text) >= room)
        return false;
    memcpy(into, text, strlen(text) + 1);
    return true;
}

/* One entry of the table. False if it is not one of ours. */
static bool read_mark(yaml_document_t *document, const yaml_node_pair_t *pair, struct mark *mark)
{
    const yaml_node_t *name = yaml_document_get_node(document, pair->key);
    const yaml_node_t *fields = yaml_document_get_node(document, pair->value);
    struct number number;
    uint8_t key[QUICLB_KEY];
    if (name->type != YAML_SCALAR_NODE ||
        !copy_text((const char *)name->data.scalar.value, mark->identity, sizeof mark->identity) ||
        !copy_text(member(document, fields, "start", NULL), mark->start, sizeof mark->start) ||
        !copy_text(member(document, fields, "reserved", NULL), mark->reserved, sizeof mark->reserved) ||
        !copy_text(member(document, fields, "permutation_key", NULL), mark->permutation_key,
                   sizeof mark->permutation_key))
        return false;
    size_t digits = strlen(mark->permutation_key);
    return parse_number(mark->start, &number) && parse_number(mark->reserved, &number) &&
           (digits == 0 || (digits == 2 * QUICLB_KEY && from_hex(mark->permutation_key, digits, key)));
}

/* Reads the marks of a file, which is JSON, and so YAML. False if it is damaged. */
static bool parse_marks(struct marks *marks, const char *text, size_t length)
{
    yaml_parser_t parser;
    yaml_document_t document;
    yaml_node_t *table = NULL;
    char digits[2 * SHA256_DIGEST_SIZE + 1];
    if (!yaml_parser_initialize(&parser))
        return false;
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, length);
    bool is_good = yaml_parser_load(&parser, &document);
    if (is_good) {
        yaml_node_t *root = yaml_document_get_root_node(&document);
        const char *format = member(&document, root, "format", NULL);
        const char *expected = member(&document, root, "sha256", NULL);
        member(&document, root, "marks", &table);
        is_good = format && strcmp(format, FORMAT) == 0 && expected && table && table->type == YAML_MAPPING_NODE;
        if (is_good) {
            const yaml_node_pair_t *pairs = table->data.mapping.pairs.start;
            marks->count = (size_t)(table->data.mapping.pairs.top - pairs);
            marks->table = calloc(marks->count + 1, sizeof *marks->table);
            is_good = marks->table != NULL;
            for (size_t i = 0; i < marks->count && is_good; i++)
                is_good = read_mark(&document, &pairs[i], &marks->table[i]);
        }
        if (is_good) {
            qsort(marks->table, marks->count, sizeof *marks->table, by_identity);
            is_good = digest_table(marks, digits) && strcmp(digits, expected) == 0;
        }
        yaml_document_delete(&document);
    }
    yaml_parser_delete(&parser);
    return is_good;
}

static void close_marks(struct marks *marks)
{
    if (!marks)
        return;
    if (marks->lock >= 0)
        close(marks->lock);
    free(marks->table);
    free(marks->path);
    free(marks);
}

/* Claims a nonce file for this process and reads it; a file `path`.lock beside it is held as long as it is open. */
static struct marks *open_marks(const char *path, struct quiclb_mistakes *mistakes)
{
    struct marks *marks = calloc(1, sizeof *marks);
    char *lock = NULL;
    size_t before = mistakes->count, length = 0;
    if (!marks)
        abort();
    marks->lock = -1;
    marks->path = strdup(path);
    if (!marks->path || asprintf(&lock, "%s.lock", path) < 0)
        abort();
    marks->lock = open(lock, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (marks->lock < 0)
        mistake(mistakes, "%s: %s", lock, strerror(errno));
    else if (flock(marks->lock, LOCK_EX | LOCK_NB) < 0)
        mistake(mistakes, "%s: in use by another process; every process needs a nonce file and server IDs of its own",
                path);
    free(lock);
    if (mistakes->count == before) {
        struct stat status;
        int file = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
        char *text = NULL;
        if (file < 0 && errno == ENOENT)
            return marks; /* a fresh start */
        if (file < 0 || fstat(file, &status) < 0)
            mistake(mistakes, "%s: %s", path, strerror(errno));
        else if (!S_ISREG(status.st_mode))
            mistake(mistakes, "%s: expected a regular file", path);
        else if (status.st_mode & (S_IRWXG | S_IRWXO))
            mistake(mistakes, "%s: mode %04o, expected 0600; it holds secrets", path, status.st_mode & 0777u);
        else if (!(text = contents(file, MAX_MARKS_FILE + 1, &length)))
            mistake(mistakes, "%s: %s", path, strerror(errno));
        else if (length > MAX_MARKS_FILE || !parse_marks(marks, text, length))
            mistake(mistakes, "%s: damaged, so that it no longer says which nonces are spent. Restore the newest copy "
                              "of it, or give this server new server IDs (or new keys) and then delete it", path);
        if (file >= 0)
            close(file);
        free(text);
    }
    if (mistakes->count > before) {
        close_marks(marks);
        return NULL;
    }
    return marks;
}

static struct mark *find_mark(struct marks *marks, const char *identity)
{
    struct mark wanted;
    memcpy(wanted.identity, identity, sizeof wanted.identity);
    return marks->count ? bsearch(&wanted, marks->table, marks->count, sizeof wanted, by_identity) : NULL;
}

/* The nonces of one key and server ID: a counter from a random start, hidden by a permutation if there is no key. */

struct counter {
    struct counter *next;
    char identity[QUICLB_IDENTITY];
    size_t nonce_length;
    struct number start;
    uint64_t used, reserved, space;
    bool is_permuted;
    uint8_t permutation_key[QUICLB_KEY];
    struct aes128_ctx permutation;
};

static struct counter *make_counter(const struct quiclb_config *config, const char *identity, struct marks *marks,
                                    struct quiclb_mistakes *mistakes)
{
    struct counter *counter = calloc(1, sizeof *counter);
    struct mark *mark = marks ? find_mark(marks, identity) : NULL;
    if (!counter)
        abort();
    memcpy(counter->identity, identity, sizeof counter->identity);
    counter->nonce_length = config->nonce_length;
    counter->space = config->nonce_length < 8 ? UINT64_C(1) << 8 * config->nonce_length : UINT64_MAX;
    counter->is_permuted = !config->is_encrypted;
    if (mark) {
        struct number reserved;
        bool is_good = parse_number(mark->start, &counter->start) && fits(&counter->start, config->nonce_length) &&
                       parse_number(mark->reserved, &reserved) && fits(&reserved, 8) &&
                       (*mark->permutation_key != 0) == counter->is_permuted;
        if (is_good)
            /* What the process before us reserved and did not use is skipped: nobody knows how much that was. */
            for (size_t i = QUICLB_MAX_NONCE - 8; i < QUICLB_MAX_NONCE; i++)
                counter->reserved = counter->reserved << 8 | reserved.octets[i];
        if (!is_good || counter->reserved > counter->space) {
            mistake(mistakes, "nonce mark %s: not one for nonces of %u octets", identity, config->nonce_length);
            free(counter);
            return NULL;
        }
        counter->used = counter->reserved;
        if (counter->is_permuted)
            from_hex(mark->permutation_key, 2 * QUICLB_KEY, counter->permutation_key);
    } else {
        quiclb_random(counter->start.octets + QUICLB_MAX_NONCE - config->nonce_length, config->nonce_length);
        quiclb_random(counter->permutation_key, QUICLB_KEY);
    }
    if (!marks)
        counter->reserved = counter->space;
    aes128_set_encrypt_key(&counter->permutation, counter->permutation_key);
    return counter;
}

/* The next nonce. One must be left. */
static void take_nonce(struct counter *counter, uint8_t *nonce)
{
    struct number number = counter->start;
    add(&number, counter->used++);
    memcpy(nonce, number.octets + QUICLB_MAX_NONCE - counter->nonce_length, counter->nonce_length);
    if (counter->is_permuted)
        quiclb_four_pass(&counter->permutation, nonce, counter->nonce_length);
}

/* Makes sure that at least one more nonce is spent as far as the next process knows. */
static bool reserve(struct counter *counter, struct marks *marks)
{
    struct mark old = {0}, *mark = find_mark(marks, counter->identity);
    uint64_t reserved = counter->space - counter->used < BLOCK ? counter->space : counter->used + BLOCK;
    bool is_new = mark == NULL;
    if (is_new) {
        struct mark *table = realloc(marks->table, (marks->count + 1) * sizeof *table);
        if (!table)
            return false;
        marks->table = table;
        mark = &table[marks->count++];
        memset(mark, 0, sizeof *mark);
        memcpy(mark->identity, counter->identity, sizeof mark->identity);
        print_number(&counter->start, mark->start);
        if (counter->is_permuted)
            to_hex(counter->permutation_key, QUICLB_KEY, mark->permutation_key);
    } else {
        old = *mark;
    }
    snprintf(mark->reserved, sizeof mark->reserved, "%llu", (unsigned long long)reserved);
    if (is_new) {
        qsort(marks->table, marks->count, sizeof *marks->table, by_identity);
        mark = find_mark(marks, counter->identity);
    }
    if (!save_marks(marks)) {
        if (is_new) /* as if it had never been there */
            memmove(mark, mark + 1, (size_t)(marks->table + marks->count-- - (mark + 1)) * sizeof *mark);
        else
            *mark = old;
        return false;
    }
    counter->reserved = reserved;
    return true;
}

/* A server's file. */

enum value_key { NAME, CID_CONFIG, SERVER_ID, RESET_KEY_FILE, NONCE_FILE, MADE, TOP_KEYS };
enum cid_key { CONFIG_ID, SERVER_ID_LENGTH, NONCE_LENGTH, KEY_FILE, ENCODES_LENGTH, APPENDED_LENGTH, CID_KEYS };
static const char *const TOP[TOP_KEYS] = {"name", "cid-config", "server-id", "reset-key-file", "nonce-file", "made"};
static const char *const CID[CID_KEYS] = {"config-id", "server-id-length", "nonce-length",
                                          "key-file",  "encodes-length",   "appended-length"};

/* One value as it was written. */
struct value {
    char *text; /* NULL if there is none, or it was no scalar */
    bool is_given, is_plain;
};

struct file {
    struct value top[TOP_KEYS], cid[CID_KEYS];
    struct quiclb_mistakes *mistakes;
    yaml_parser_t parser;
    const char *path;
};

/* What a file says, with its keys. */
struct settings {
    char name[65], made[21];
    bool has_config, has_reset_key;
    struct quiclb_config config;
    uint8_t server_id[QUICLB_MAX_SERVER_ID];
    uint8_t reset_key[QUICLB_RESET_KEY];
    char *nonce_file;
};

static bool next_event(struct file *file, yaml_event_t *event)
{
    if (yaml_parser_parse(&file->parser, event))
        return true;
    mistake(file->mistakes, "%s: line %zu, column %zu: not YAML: %s", file->path, file->parser.problem_mark.line + 1,
            file->parser.problem_mark.column + 1, file->parser.problem ? file->parser.problem : "unreadable");
    return false;
}

/* Reads over what began with `event`. */
static bool skip(struct file *file, yaml_event_type_t type)
{
    for (int depth = type == YAML_MAPPING_START_EVENT || type == YAML_SEQUENCE_START_EVENT; depth > 0;) {
        yaml_event_t event;
        if (!next_event(file, &event))
            return false;
        depth += event.type == YAML_MAPPING_START_EVENT || event.type == YAML_SEQUENCE_START_EVENT;
        depth -= event.type == YAML_MAPPING_END_EVENT || event.type == YAML_SEQUENCE_END_EVENT;
        yaml_event_delete(&event);
    }
    return true;
}

/* Reads the values of a mapping, of which the start is read already. False if it is no use to go on. */
static bool read_mapping(struct file *file, const char *prefix, const char *const *keys, struct value *values,
                         size_t count)
{
    for (;;) {
        yaml_event_t event;
        char quoted[MAX_SHOWN + 4];
        size_t key = count;
        if (!next_event(file, &event))
            return false;
        if (event.type == YAML_MAPPING_END_EVENT) {
            yaml_event_delete(&event);
            return true;
        }
        if (event.type == YAML_SCALAR_EVENT) {
            const char *word = (const char *)event.data.scalar.value;
            for (key = 0; key < count && strcmp(keys[key], word) != 0;)
                key++;
            if (key == count)
                mistake(file->mistakes, "%s%s: no such key", prefix, shown(word, quoted));
            else if (values[key].is_given)
                mistake(file->mistakes, "%s%s: given twice: expected once", prefix, word);
        } else {
            mistake(file->mistakes, "%s: a list, mapping or alias for a key: expected a word", file->path);
            if (!skip(file, event.type)) {
                yaml_event_delete(&event);
                return false;
            }
        }
        yaml_event_delete(&event);

        if (!next_event(file, &event))
            return false;
        bool is_good = true;
        bool is_first = key < count && !values[key].is_given;
        if (is_first)
            values[key].is_given = true;
        if (is_first && event.type == YAML_SCALAR_EVENT) {
            const yaml_char_t *tag = event.data.scalar.tag;
            if (tag && strcmp((const char *)tag, "!") != 0)
                mistake(file->mistakes, "%s%s: tags are not used here; write the value alone", prefix, keys[key]);
            else if (strlen((const char *)event.data.scalar.value) != event.data.scalar.length)
                mistake(file->mistakes, "%s%s: expected no zero in it", prefix, keys[key]);
            else {
                values[key].text = strdup((const char *)event.data.scalar.value);
                values[key].is_plain = event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE && !tag;
            }
        } else if (is_first && event.type == YAML_MAPPING_START_EVENT && keys == TOP && key == CID_CONFIG) {
            is_good = read_mapping(file, "cid-config.", CID, file->cid, CID_KEYS);
        } else {
            if (is_first)
                mistake(file->mistakes, "%s%s: a list, mapping or alias: expected one value", prefix, keys[key]);
            is_good = skip(file, event.type);
        }
        yaml_event_delete(&event);
        if (!is_good)
            return false;
    }
}

/* Reads the file's tree. False if there is none to look at. */
static bool read_tree(struct file *file, const char *text, size_t length)
{
    yaml_event_t event;
    bool is_mapping = false;
    yaml_parser_set_input_string(&file->parser, (const unsigned char *)text, length);
    do {
        if (!next_event(file, &event))
            return false;
        yaml_event_type_t type = event.type;
        yaml_event_delete(&event);
        if (type == YAML_STREAM_END_EVENT) {
            mistake(file->mistakes, "%s: nothing in it: expected a mapping of keys to values", file->path);
            return false;
        }
        if (type == YAML_SCALAR_EVENT || type == YAML_SEQUENCE_START_EVENT || type == YAML_ALIAS_EVENT) {
            mistake(file->mistakes, "%s: expected a mapping of keys to values", file->path);
            return false;
        }
        is_mapping = type == YAML_MAPPING_START_EVENT;
    } while (!is_mapping);
    if (!read_mapping(file, "", TOP, file->top, TOP_KEYS))
        return false;
    for (int i = 0; i < 2; i++) { /* the document's end, the stream's end */
        if (!next_event(file, &event))
            return false;
        yaml_event_type_t type = event.type;
        yaml_event_delete(&event);
        if (type == YAML_DOCUMENT_START_EVENT) {
            mistake(file->mistakes, "%s: a second document after `---`: expected one", file->path);
            return false;
        }
    }
    return true;
}

/* What YAML 1.1 takes a plain text for, if not for a text. */
static const char *yaml_takes_for(const char *text)
{
    static const struct {
        const char *pattern, *word;
    } kinds[] = {
        {"^(~|null|Null|NULL|)$", "nothing"},
        {"^(yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$", "true or false"},
        {"^[-+]?(0b[01_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|[1-9][0-9_]*(:[0-5]?[0-9])+)$", "an integer"},
        {"^[-+]?(([0-9][0-9_]*)[.][0-9_]*([eE][-+][0-9]+)?|[.][0-9][0-9_]*([eE][-+][0-9]+)?|"
         "[0-9][0-9_]*(:[0-5]?[0-9])+[.][0-9_]*|[.](inf|Inf|INF|nan|NaN|NAN))$",
         "a number"},
        {"^[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}", "a date"},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        regex_t regex;
        if (regcomp(&regex, kinds[i].pattern, REG_EXTENDED | REG_NOSUB) != 0)
            abort();
        bool is_so = regexec(&regex, text, 0, NULL, 0) == 0;
        regfree(&regex);
        if (is_so)
            return kinds[i].word;
    }
    return NULL;
}

/* A value that has to be a text. NULL, and the reason noted, if it is there and none. */
static const char *text_of(const struct value *value, const char *path, struct quiclb_mistakes *mistakes)
{
    char quoted[MAX_SHOWN + 4];
    if (!value->text)
        return NULL;
    const char *taken = value->is_plain ? yaml_takes_for(value->text) : NULL;
    if (taken) {
        mistake(mistakes, "%s: %s: YAML takes this for %s; put it in quotes", path, shown(value->text, quoted), taken);
        return NULL;
    }
    return value->text;
}

static void integer_of(const struct value *value, const char *path, unsigned low, unsigned high, unsigned *result,
                       struct quiclb_mistakes *mistakes)
{
    char quoted[MAX_SHOWN + 4];
    if (!value->text)
        return;
    size_t digits = strspn(value->text, "0123456789");
    bool is_number = value->is_plain && digits > 0 && digits < 9 && !value->text[digits] &&
                     (value->text[0] != '0' || digits == 1);
    unsigned long number = is_number ? strtoul(value->text, NULL, 10) : 0;
    if (is_number && number >= low && number <= high)
        *result = (unsigned)number;
    else
        mistake(mistakes, "%s: %s: expected an integer, %u to %u", path, shown(value->text, quoted), low, high);
}

static void flag_of(const struct value *value, const char *path, bool *result, struct quiclb_mistakes *mistakes)
{
    char quoted[MAX_SHOWN + 4];
    if (!value->text)
        return;
    if (value->is_plain && strcmp(value->text, "true") == 0)
        *result = true;
    else if (value->is_plain && strcmp(value->text, "false") == 0)
        *result = false;
    else
        mistake(mistakes, "%s: %s: expected true or false", path, shown(value->text, quoted));
}

/* The name of a file; a relative one starts at the directory of the server's file. NULL if there is none. */
static char *file_of(const struct value *value, const char *path, const char *of, struct quiclb_mistakes *mistakes)
{
    const char *text = text_of(value, path, mistakes);
    char *name = NULL;
    uint8_t key[QUICLB_RESET_KEY];
    if (!text)
        return NULL;
    size_t length = strlen(text);
    if ((length == 2 * QUICLB_KEY || length == 2 * QUICLB_RESET_KEY) && from_hex(text, length, key)) {
        mistake(mistakes, "%s: looks like a key: expected the name of the file that holds it", path);
        return NULL;
    }
    for (size_t i = 0; i < length; i++)
        if (iscntrl((unsigned char)text[i]))
            length = 0;
    if (length == 0) {
        mistake(mistakes, "%s: expected the name of a file", path);
        return NULL;
    }
    const char *slash = text[0] == '/' ? NULL : strrchr(of, '/');
    if (asprintf(&name, "%.*s%s", slash ? (int)(slash - of) + 1 : 0, of, text) < 0)
        abort();
    return name;
}

static void required(const struct value *value, const char *path, struct quiclb_mistakes *mistakes)
{
    if (!value->is_given)
        mistake(mistakes, "%s: missing", path);
}

static bool matches(const char *text, const char *pattern)
{
    regex_t regex;
    if (regcomp(&regex, pattern, REG_EXTENDED | REG_NOSUB) != 0)
        abort();
    bool is_so = regexec(&regex, text, 0, NULL, 0) == 0;
    regfree(&regex);
    return is_so;
}

static void read_cid_config(struct file *file, struct settings *settings)
{
    struct quiclb_mistakes *mistakes = file->mistakes;
    struct quiclb_config *config = &settings->config;
    size_t before = mistakes->count;
    *config = (struct quiclb_config){.encodes_length = true};
    required(&file->cid[CONFIG_ID], "cid-config.config-id", mistakes);
    required(&file->cid[SERVER_ID_LENGTH], "cid-config.server-id-length", mistakes);
    required(&file->cid[NONCE_LENGTH], "cid-config.nonce-length", mistakes);
    integer_of(&file->cid[CONFIG_ID], "cid-config.config-id", 0, CONFIG_IDS - 1, &config->config_id, mistakes);
    integer_of(&file->cid[SERVER_ID_LENGTH], "cid-config.server-id-length", 1, QUICLB_MAX_SERVER_ID,
               &config->server_id_length, mistakes);
    integer_of(&file->cid[NONCE_LENGTH], "cid-config.nonce-length", 4, QUICLB_MAX_NONCE, &config->nonce_length,
               mistakes);
    integer_of(&file->cid[APPENDED_LENGTH], "cid-config.appended-length", 0, 14, &config->appended_length, mistakes);
    flag_of(&file->cid[ENCODES_LENGTH], "cid-config.encodes-length", &config->encodes_length, mistakes);
    if (mistakes->count == before) {
        unsigned block = config->server_id_length + config->nonce_length;
        size_t length = quiclb_codec_length(config);
        if (block > QUICLB_MAX_BLOCK)
            mistake(mistakes, "cid-config: server ID and nonce take %u octets together: expected at most %d", block,
                    QUICLB_MAX_BLOCK);
        else if (length > QUICLB_MAX_CID)
            mistake(mistakes, "cid-config: %u appended octets: a CID holds at most %d octets in all",
                    config->appended_length, QUICLB_MAX_CID);
        else if (length < QUICLB_MIN_CID)
            mistake(mistakes, "cid-config: connection IDs of %zu octets: expected at least %d", length, QUICLB_MIN_CID);
    }
    char *key_file = file_of(&file->cid[KEY_FILE], "cid-config.key-file", file->path, mistakes);
    if (key_file)
        config->is_encrypted = read_key(key_file, config->key, QUICLB_KEY, mistakes);
    free(key_file);
    settings->has_config = true;
}

static void read_server_id(struct file *file, struct settings *settings)
{
    struct quiclb_mistakes *mistakes = file->mistakes;
    const struct value *value = &file->top[SERVER_ID];
    const char *text = text_of(value, "server-id", mistakes);
    if (settings->has_config && !value->is_given)
        mistake(mistakes, "server-id: missing: expected one, since there is a cid-config");
    else if (!settings->has_config && value->is_given && !file->top[CID_CONFIG].is_given)
        mistake(mistakes, "server-id: a server ID without a cid-config: expected both or neither");
    if (!text)
        return;
    size_t digits = strlen(text);
    unsigned expected = settings->config.server_id_length;
    if (digits < 2 || digits > 2 * QUICLB_MAX_SERVER_ID || !from_hex(text, digits, settings->server_id))
        mistake(mistakes, "server-id: expected 1 to %d octets, two hex digits each, in quotes", QUICLB_MAX_SERVER_ID);
    else if (expected && digits != 2 * expected)
        mistake(mistakes, "server-id: %zu octets, but cid-config.server-id-length is %u", digits / 2, expected);
}

/* Reads a server's file. False, with the reasons, if anything is wrong with it. */
static bool read_settings(const char *path, struct settings *settings, struct quiclb_mistakes *mistakes)
{
    struct file file = {.mistakes = mistakes, .path = path};
    struct stat status;
    size_t length = 0;
    char *text = NULL;
    memset(settings, 0, sizeof *settings);
    memset(mistakes, 0, sizeof *mistakes);
    int descriptor = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (descriptor < 0 || fstat(descriptor, &status) < 0)
        mistake(mistakes, "%s: cannot be read: %s", path, strerror(errno));
    else if (!S_ISREG(status.st_mode))
        mistake(mistakes, "%s: not a regular file", path);
    else if (!(text = contents(descriptor, MAX_FILE + 1, &length)))
        mistake(mistakes, "%s: cannot be read: %s", path, strerror(errno));
    else if (length > MAX_FILE)
        mistake(mistakes, "%s: more than %d MiB: expected a configuration", path, MAX_FILE >> 20);
    if (descriptor >= 0)
        close(descriptor);
    if (mistakes->count == 0) {
        if (!yaml_parser_initialize(&file.parser))
            abort();
        if (read_tree(&file, text, length)) {
            const char *name = text_of(&file.top[NAME], "name", mistakes);
            const char *made = text_of(&file.top[MADE], "made", mistakes);
            required(&file.top[NAME], "name", mistakes);
            if (name && matches(name, "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"))
                memcpy(settings->name, name, strlen(name) + 1);
            else if (name)
                mistake(mistakes, "name: expected up to 64 letters, digits, dots, hyphens and underscores");
            if (made && matches(made, "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$"))
                memcpy(settings->made, made, strlen(made) + 1);
            else if (made)
                mistake(mistakes, "made: expected a moment as \"2026-11-21T09:42:25Z\"");
            if (file.top[CID_CONFIG].text)
                mistake(mistakes, "cid-config: expected a mapping");
            else if (file.top[CID_CONFIG].is_given)
                read_cid_config(&file, settings);
            read_server_id(&file, settings);
            char *reset_key = file_of(&file.top[RESET_KEY_FILE], "reset-key-file", path, mistakes);
            if (reset_key)
                settings->has_reset_key = read_key(reset_key, settings->reset_key, QUICLB_RESET_KEY, mistakes);
            free(reset_key);
            settings->nonce_file = file_of(&file.top[NONCE_FILE], "nonce-file", path, mistakes);
        }
        yaml_parser_delete(&file.parser);
    }
    for (size_t i = 0; i < TOP_KEYS; i++)
        free(file.top[i].text);
    for (size_t i = 0; i < CID_KEYS; i++)
        free(file.cid[i].text);
    free(text);
    return mistakes->count == 0;
}

static void forget_settings(struct settings *settings)
{
    free(settings->nonce_file);
    explicit_bzero(settings, sizeof *settings);
}

/* The server. */

/* What connection IDs with one config ID are made of: that of now, or of an earlier configuration. */
struct known_as {
    bool is_known, has_reset_key;
    struct quiclb_codec codec;
    uint8_t server_id[QUICLB_MAX_SERVER_ID];
    uint8_t reset_key[QUICLB_RESET_KEY];
};

struct quiclb {
    pthread_mutex_t mutex;
    char *path;
    char name[65], made[21];
    size_t cid_length;
    struct known_as known_as[CONFIG_IDS];
    const struct known_as *current; /* NULL without a configuration */
    struct counter *counters, *counter;
    struct marks *marks;
    char *nonce_file;
    bool store_failed;
    unsigned attempts;
    uint8_t process_key[QUICLB_RESET_KEY]; /* of tokens that nobody else has to know */
};

static struct counter *find_counter(const struct quiclb *server, const struct settings *settings)
{
    char identity[QUICLB_IDENTITY];
    struct counter *counter = server->counters;
    quiclb_identity(&settings->config, settings->server_id, identity);
    while (counter && strcmp(counter->identity, identity) != 0)
        counter = counter->next;
    return counter;
}

/* What speaks against a file that is good as such: it is stale, or cut off, or takes a restart. */
static void check_against(const struct quiclb *server, const struct settings *settings,
                          struct quiclb_mistakes *mistakes)
{
    const char *old = server->nonce_file ? server->nonce_file : "none";
    const char *new = settings->nonce_file ? settings->nonce_file : "none";
    const struct counter *counter = settings->has_config ? find_counter(server, settings) : NULL;
    size_t length = settings->has_config ? quiclb_codec_length(&settings->config) : server->cid_length;
    if (*settings->made && strcmp(settings->made, server->made) < 0)
        mistake(mistakes, "made: %s: older than the file in use, which is of %s", settings->made, server->made);
    else if (!*settings->made && counter && counter != server->counter)
        /* Section 3.1: no connection ID is made under an old configuration. */
        mistake(mistakes, "cid-config: this process has left this key and server ID for another already: expected a "
                          "new key, or a file that says when it was made");
    if (strcmp(old, new) != 0)
        mistake(mistakes, "nonce-file: %s: this process has %s; a restart changes it", new, old);
    if (server->current && !settings->has_config)
        mistake(mistakes, "cid-config: missing: the file in use has one; a restart changes it");
    if (server->current && server->current->has_reset_key && !settings->has_reset_key)
        mistake(mistakes, "reset-key-file: missing: the file in use has one; a restart changes it");
    if (length != server->cid_length)
        mistake(mistakes, "cid-config: connection IDs of %zu octets: this process has some of %zu; a restart changes "
                          "it", length, server->cid_length);
}

/* Issues connection IDs as `settings` say from now on. False, and nothing changed, if their nonces cannot be used. */
static bool take_settings(struct quiclb *server, const struct settings *settings, struct quiclb_mistakes *mistakes)
{
    struct counter *counter = NULL;
    if (settings->has_config) {
        counter = find_counter(server, settings);
        if (!counter) {
            char identity[QUICLB_IDENTITY];
            quiclb_identity(&settings->config, settings->server_id, identity);
            counter = make_counter(&settings->config, identity, server->marks, mistakes);
            if (!counter)
                return false;
            counter->next = server->counters;
            server->counters = counter;
        }
        struct known_as *known_as = &server->known_as[settings->config.config_id];
        known_as->is_known = true;
        known_as->has_reset_key = settings->has_reset_key;
        quiclb_codec_init(&known_as->codec, &settings->config);
        memcpy(known_as->server_id, settings->server_id, sizeof known_as->server_id);
        memcpy(known_as->reset_key, settings->reset_key, sizeof known_as->reset_key);
        server->current = known_as;
    } else {
        server->current = NULL;
    }
    server->counter = counter;
    memcpy(server->name, settings->name, sizeof server->name);
    memcpy(server->made, settings->made, sizeof server->made);
    return true;
}

struct quiclb *quiclb_open(const char *path, struct quiclb_mistakes *mistakes)
{
    struct settings settings;
    struct quiclb *server = calloc(1, sizeof *server);
    if (!server || !(server->path = strdup(path)))
        abort();
    pthread_mutex_init(&server->mutex, NULL);
    quiclb_random(server->process_key, sizeof server->process_key);
    bool is_good = read_settings(path, &settings, mistakes);
    if (is_good) {
        server->cid_length = settings.has_config ? quiclb_codec_length(&settings.config) : QUICLB_MIN_CID;
        server->nonce_file = settings.nonce_file;
        settings.nonce_file = NULL;
        if (server->nonce_file)
            is_good = (server->marks = open_marks(server->nonce_file, mistakes)) != NULL;
        is_good = is_good && take_settings(server, &settings, mistakes);
    }
    forget_settings(&settings);
    if (!is_good) {
        quiclb_close(server);
        return NULL;
    }
    return server;
}

bool quiclb_reload(struct quiclb *server, struct quiclb_mistakes *mistakes)
{
    struct settings settings;
    bool is_good = read_settings(server->path, &settings, mistakes);
    if (is_good) {
        pthread_mutex_lock(&server->mutex);
        check_against(server, &settings, mistakes);
        is_good = mistakes->count == 0 && take_settings(server, &settings, mistakes);
        pthread_mutex_unlock(&server->mutex);
    }
    forget_settings(&settings);
    return is_good;
}

void quiclb_close(struct quiclb *server)
{
    if (!server)
        return;
    for (struct counter *counter = server->counters, *next; counter; counter = next) {
        next = counter->next;
        free(counter);
    }
    close_marks(server->marks);
    free(server->nonce_file);
    free(server->path);
    pthread_mutex_destroy(&server->mutex);
    explicit_bzero(server, sizeof *server);
    free(server);
}

void quiclb_name(struct quiclb *server, char name[65])
{
    pthread_mutex_lock(&server->mutex);
    memcpy(name, server->name, sizeof server->name);
    pthread_mutex_unlock(&server->mutex);
}

size_t quiclb_server_id(struct quiclb *server, uint8_t server_id[QUICLB_MAX_SERVER_ID])
{
    size_t length = 0;
    pthread_mutex_lock(&server->mutex);
    if (server->current) {
        length = server->current->codec.config.server_id_length;
        memcpy(server_id, server->current->server_id, length);
    }
    pthread_mutex_unlock(&server->mutex);
    return length;
}

size_t quiclb_cid_length(const struct quiclb *server)
{
    return server->cid_length;
}

/* Whether there is a nonce that is certainly fresh. */
static bool has_nonce(struct quiclb *server)
{
    struct counter *counter = server->counter;
    if (!counter || counter->used >= counter->space)
        return false;
    if (counter->used < counter->reserved)
        return true;
    if (server->store_failed && ++server->attempts % RETRY_EVERY != 0)
        return false; /* a full disk must not cost a write per packet */
    server->store_failed = !reserve(counter, server->marks);
    return !server->store_failed;
}

void quiclb_new_cid(struct quiclb *server, uint8_t *cid)
{
    uint8_t nonce[QUICLB_MAX_NONCE], spare[1 + QUICLB_MAX_CID];
    quiclb_random(spare, sizeof spare);
    pthread_mutex_lock(&server->mutex);
    if (has_nonce(server)) {
        take_nonce(server->counter, nonce);
        quiclb_encode(&server->current->codec, server->current->server_id, nonce, spare[0], spare + 1, cid);
    } else {
        memcpy(cid, spare, server->cid_length);
        cid[0] = (uint8_t)(QUICLB_UNROUTABLE << 5 | (server->cid_length - 1));
    }
    pthread_mutex_unlock(&server->mutex);
}

void quiclb_token_of(struct quiclb *server, const uint8_t *cid, size_t length, uint8_t token[QUICLB_TOKEN])
{
    unsigned config_id = length ? cid[0] >> 5 : QUICLB_UNROUTABLE;
    pthread_mutex_lock(&server->mutex);
    const struct known_as *known_as = config_id < CONFIG_IDS ? &server->known_as[config_id] : NULL;
    quiclb_token(known_as && known_as->has_reset_key ? known_as->reset_key : server->process_key, cid, length, token);
    pthread_mutex_unlock(&server->mutex);
}

bool quiclb_may_reset(struct quiclb *server, const uint8_t *cid, size_t length)
{
    uint8_t server_id[QUICLB_MAX_SERVER_ID], nonce[QUICLB_MAX_NONCE];
    unsigned config_id = length ? cid[0] >> 5 : QUICLB_UNROUTABLE;
    if (config_id >= CONFIG_IDS)
        return false;
    pthread_mutex_lock(&server->mutex);
    const struct known_as *known_as = &server->known_as[config_id];
    bool may = known_as->is_known && known_as->has_reset_key &&
               quiclb_decode(&known_as->codec, cid, length, server_id, nonce) &&
               memcmp(server_id, known_as->server_id, known_as->codec.config.server_id_length) == 0;
    pthread_mutex_unlock(&server->mutex);
    return may;
}
