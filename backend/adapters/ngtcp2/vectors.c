/* Reads vectors (tests/data/adapter-vectors.json) on standard input and writes them on standard output with everything
 * computed anew that quiclb.c can compute. A test compares. JSON is YAML, which libyaml reads. */
#include "quiclb.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

enum { MAX_FIELDS = 16 };

struct fields {
    size_t count;
    struct field {
        const char *name, *value;
        bool is_quoted;
        char computed[65];
    } fields[MAX_FIELDS];
};

static void fail(const char *reason)
{
    fprintf(stderr, "vectors: %s\n", reason);
    exit(1);
}

static struct field *field(struct fields *fields, const char *name)
{
    for (size_t i = 0; i < fields->count; i++)
        if (strcmp(fields->fields[i].name, name) == 0)
            return &fields->fields[i];
    fail("a field is missing");
    return NULL;
}

static size_t octets(struct fields *fields, const char *name, uint8_t *into, size_t room)
{
    const char *digits = field(fields, name)->value;
    size_t length = strlen(digits) / 2;
    if (length > room)
        fail("a field is too long");
    for (size_t i = 0; i < length; i++) {
        unsigned octet;
        if (sscanf(digits + 2 * i, "%2x", &octet) != 1)
            fail("expected hex digits");
        into[i] = (uint8_t)octet;
    }
    return length;
}

static void computed(struct fields *fields, const char *name, const uint8_t *value, size_t length)
{
    char *digits = field(fields, name)->computed;
    digits[0] = 0;
    for (size_t i = 0; i < length; i++)
        snprintf(digits + 2 * i, 3, "%02x", value[i]);
    field(fields, name)->value = digits;
}

static unsigned number(struct fields *fields, const char *name)
{
    return (unsigned)strtoul(field(fields, name)->value, NULL, 10);
}

static void read_key(struct fields *fields, struct quiclb_config *config)
{
    config->is_encrypted = field(fields, "key")->is_quoted;
    if (config->is_encrypted && octets(fields, "key", config->key, QUICLB_KEY) != QUICLB_KEY)
        fail("expected a key of 16 octets");
}

static void cid(struct fields *fields)
{
    struct quiclb_config config = {0};
    struct quiclb_codec codec;
    uint8_t server_id[QUICLB_MAX_SERVER_ID], nonce[QUICLB_MAX_NONCE], appended[QUICLB_MAX_CID];
    uint8_t made[QUICLB_MAX_CID], given[QUICLB_MAX_CID];
    config.config_id = number(fields, "config_id");
    config.server_id_length = (unsigned)octets(fields, "server_id", server_id, sizeof server_id);
    config.nonce_length = (unsigned)octets(fields, "nonce", nonce, sizeof nonce);
    config.appended_length = (unsigned)octets(fields, "appended", appended, sizeof appended);
    config.encodes_length = strcmp(field(fields, "encodes_length")->value, "true") == 0;
    read_key(fields, &config);
    if (quiclb_codec_length(&config) > QUICLB_MAX_CID)
        fail("too long a connection ID");
    quiclb_codec_init(&codec, &config);
    quiclb_encode(&codec, server_id, nonce, number(fields, "low_bits"), appended, made);
    /* What is decoded is what the file has, not what was just made. */
    size_t length = octets(fields, "cid", given, sizeof given);
    if (!quiclb_decode(&codec, given, length, server_id, nonce))
        fail("a connection ID that cannot be decoded");
    computed(fields, "server_id", server_id, config.server_id_length);
    computed(fields, "nonce", nonce, config.nonce_length);
    computed(fields, "cid", made, quiclb_codec_length(&config));
}

static void token(struct fields *fields)
{
    uint8_t key[QUICLB_RESET_KEY], given[QUICLB_MAX_CID], made[QUICLB_TOKEN];
    octets(fields, "key", key, sizeof key);
    quiclb_token(key, given, octets(fields, "cid", given, sizeof given), made);
    computed(fields, "token", made, sizeof made);
}

static void identity(struct fields *fields)
{
    struct quiclb_config config = {0};
    uint8_t server_id[QUICLB_MAX_SERVER_ID];
    config.config_id = number(fields, "config_id");
    config.nonce_length = number(fields, "nonce_length");
    config.server_id_length = (unsigned)octets(fields, "server_id", server_id, sizeof server_id);
    read_key(fields, &config);
    quiclb_identity(&config, server_id, field(fields, "identity")->computed);
    field(fields, "identity")->value = field(fields, "identity")->computed;
}

static void permutation(struct fields *fields)
{
    uint8_t key[QUICLB_KEY], text[QUICLB_MAX_CID];
    struct aes128_ctx aes;
    octets(fields, "key", key, sizeof key);
    size_t length = octets(fields, "counter", text, sizeof text);
    aes128_set_encrypt_key(&aes, key);
    quiclb_four_pass(&aes, text, length);
    computed(fields, "nonce", text, length);
}

static const struct {
    const char *name;
    void (*compute)(struct fields *);
} SECTIONS[] = {{"cids", cid}, {"tokens", token}, {"identities", identity}, {"permutations", permutation}};

static void print_entry(yaml_document_t *document, const yaml_node_t *entry, void (*compute)(struct fields *))
{
    struct fields fields = {0};
    for (const yaml_node_pair_t *pair = entry->data.mapping.pairs.start; pair < entry->data.mapping.pairs.top; pair++) {
        const yaml_node_t *key = yaml_document_get_node(document, pair->key);
        const yaml_node_t *value = yaml_document_get_node(document, pair->value);
        if (fields.count == MAX_FIELDS || value->type != YAML_SCALAR_NODE)
            fail("an entry of another form");
        struct field *next = &fields.fields[fields.count++];
        next->name = (const char *)key->data.scalar.value;
        next->value = (const char *)value->data.scalar.value;
        next->is_quoted = value->data.scalar.style != YAML_PLAIN_SCALAR_STYLE;
    }
    compute(&fields);
    for (size_t i = 0; i < fields.count; i++) {
        const char *quote = fields.fields[i].is_quoted ? "\"" : "";
        printf("%s\"%s\": %s%s%s", i ? ", " : "{", fields.fields[i].name, quote, fields.fields[i].value, quote);
    }
    printf("}");
}

int main(void)
{
    yaml_parser_t parser;
    yaml_document_t document;
    if (!yaml_parser_initialize(&parser))
        fail("no memory");
    yaml_parser_set_input_file(&parser, stdin);
    if (!yaml_parser_load(&parser, &document))
        fail("not JSON");
    yaml_node_t *root = yaml_document_get_root_node(&document);
    if (!root || root->type != YAML_MAPPING_NODE)
        fail("expected an object");
    printf("{");
    for (size_t i = 0; i < sizeof SECTIONS / sizeof SECTIONS[0]; i++) {
        printf("%s\"%s\": [", i ? ",\n" : "", SECTIONS[i].name);
        const yaml_node_pair_t *end = root->data.mapping.pairs.top;
        for (const yaml_node_pair_t *pair = root->data.mapping.pairs.start; pair < end; pair++) {
            const yaml_node_t *key = yaml_document_get_node(&document, pair->key);
            const yaml_node_t *list = yaml_document_get_node(&document, pair->value);
            if (strcmp((const char *)key->data.scalar.value, SECTIONS[i].name) != 0)
                continue;
            for (const yaml_node_item_t *item = list->data.sequence.items.start; item < list->data.sequence.items.top;
                 item++) {
                printf("%s\n", item == list->data.sequence.items.start ? "" : ",");
                print_entry(&document, yaml_document_get_node(&document, *item), SECTIONS[i].compute);
            }
        }
        printf("]");
    }
    printf("}\n");
    yaml_document_delete(&document);
    yaml_parser_delete(&parser);
    return 0;
}
