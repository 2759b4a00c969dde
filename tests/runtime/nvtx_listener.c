/* A stand-in for Nsight: an NVTX 3 injection library that writes every range it hears to the file $NVTX_HEARD, a line each:
 * "<domain> push <message>" or "<domain> pop". The types are those of NVTX's nvtxTypes.h, as far as they are needed. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*function)(void);
typedef struct {
    size_t size;
    int (*get_module)(int module, function ***table, unsigned *length);
} callbacks;
typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    uint64_t payload;
    int32_t message_type; /* 1: char, 2: wchar_t, 3: registered */
    const void *message;
} attributes;

static FILE *heard;

static void *new_domain(const char *name) { return strdup(name); }

static void *new_domain_wide(const wchar_t *name) {
    char *text = malloc(256);
    snprintf(text, 256, "%ls", name);
    return text;
}

static void *registered(void *domain, const char *text) { return strdup(text); }

static void *registered_wide(void *domain, const wchar_t *text) { return new_domain_wide(text); }

static int push(void *domain, const attributes *range) {
    const char *format = range->message_type == 2 ? "%s push %ls\n" : "%s push %s\n";
    fprintf(heard, format, domain ? (const char *)domain : "-", range->message);
    return 0;
}

static int pop(void *domain) {
    fprintf(heard, "%s pop\n", domain ? (const char *)domain : "-");
    fflush(heard);
    return 0;
}

int InitializeInjectionNvtx2(const void *(*get_table)(uint32_t)) {
    const callbacks *found = get_table(1);
    function **table;
    unsigned length;
    heard = fopen(getenv("NVTX_HEARD"), "w");
    if (!heard || !found || !found->get_module(5, &table, &length) || length < 14) return 0; /* 5: functions of domains */
    *table[4] = (function)push;
    *table[5] = (function)pop;
    *table[10] = (function)registered;
    *table[11] = (function)registered_wide;
    *table[12] = (function)new_domain;
    *table[13] = (function)new_domain_wide;
    return 1;
}
