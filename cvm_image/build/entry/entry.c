/* What the firmware starts: takes the host's AML away, names the key of our drivers, and starts the kernel it carries.
 *
 * The file that holds it is measured as a whole. It is position-independent and calls nothing but
 * the firmware (UEFI specification 2.10: boot services LoadImage and StartImage, runtime SetVariable).
 * The first bytes of its image are `parts`, which the build fills in.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define FIRMWARE __attribute__((ms_abi))

typedef struct { u32 a; u16 b, c; u8 d[8]; } Guid;
typedef struct { u64 offset, size; } Part;

/* Offsets from the image's start. Filled in by the build; volatile, so that the compiler does not think them zero. */
__attribute__((section(".parts"), used)) static const volatile struct { u64 here; Part kernel, certificate, dsdt; } parts = {0};

typedef struct { u64 signature; u32 revision, size, crc, reserved; } Header;
typedef struct { Guid guid; u8 *table; } Configuration;
typedef struct Console { void *reset; u64 (FIRMWARE *say)(struct Console *, const u16 *); } Console;
typedef u64 (FIRMWARE *GetVariable)(const u16 *, const Guid *, u32 *, u64 *, void *);
typedef struct {
    Header header;
    void *unused1[6];
    GetVariable get_variable;
    void *unused3[1];
    u64 (FIRMWARE *set_variable)(const u16 *, const Guid *, u32, u64, const void *);
    void *unused2[1];
    void (FIRMWARE *reset)(u32, u64, u64, void *);
} Runtime;
typedef struct {
    Header header;
    void *unused1[5];
    u64 (FIRMWARE *allocate)(u32, u64, void **);
    void *unused2[1];
    u64 (FIRMWARE *create_event)(u32, u64, void *, void *, void **);
    void *unused4[8];
    u64 (FIRMWARE *handle_protocol)(void *, const Guid *, void **);
    void *unused3[5];
    u64 (FIRMWARE *load_image)(u8, void *, void *, const void *, u64, void **);
    u64 (FIRMWARE *start_image)(void *, u64 *, u16 **);
} Boot;
typedef struct {
    Header header;
    u16 *vendor;
    u64 revision;
    void *in_handle, *in;
    void *out_handle;
    Console *out;
    void *error_handle, *error;
    Runtime *runtime;
    Boot *boot;
    u64 count;
    Configuration *configuration;
} System;
typedef struct {
    u32 revision;
    void *parent;
    System *system;
    void *device, *path, *reserved;
    u32 options_size;
    void *options;
    void *base;
    u64 size;
} Loaded;

static int same(const u8 *a, const u8 *b, u64 n) {
    while (n--)
        if (*a++ != *b++) return 0;
    return 1;
}

static void copy(u8 *to, const volatile u8 *from, u64 n) {
    while (n--) *(volatile u8 *)to++ = *from++;
}

static u32 get32(const u8 *at) { return at[0] | at[1] << 8 | at[2] << 16 | (u32)at[3] << 24; }
static u64 get64(const u8 *at) { return get32(at) | (u64)get32(at + 4) << 32; }

static void put(u8 *at, u64 value, int n) {
    for (int i = 0; i < n; i++) ((volatile u8 *)at)[i] = value >> 8 * i;
}

/* Set the byte at `place` so that all `size` bytes add up to zero (ACPI specification 6.5, 5.2.6). */
static void add_up(u8 *table, u64 size, u64 place) {
    u8 sum = 0;
    table[place] = 0;
    for (u64 i = 0; i < size; i++) sum += table[i];
    table[place] = -sum;
}

/* Tables without AML that a guest needs beside the FADT: processors, PCI configuration space, timers that hold. */
static int kept(const u8 *table) {
    return same(table, (const u8 *)"APIC", 4) || same(table, (const u8 *)"MCFG", 4) ||
           same(table, (const u8 *)"WAET", 4);
}

/* The kernel writes to the registers that the FADT names (ACPI 6.5, 5.2.9), and would to memory, if that says so: what is
 * no I/O port is taken out, and the old fields, which are ports, stay. */
static void keep_ports(u8 *fadt, u32 size) {
    static const u8 registers[] = {116, 148, 160, 172, 184, 196, 208, 220, 232, 244};
    for (u32 i = 0; i <= sizeof registers; i++) {
        u32 at = i < sizeof registers ? registers[i] : 256; /* which no byte holds */
        if (at < size && fadt[at] != 1 /* I/O port */)
            for (u32 j = at; j < at + 12 && j < size; j++) put(fadt + j, 0, 1);
    }
}

/* Leave of the host's ACPI tables those without AML, under our DSDT. Returns 0, or what is wrong. */
static const u16 *replace_aml(System *system, const u8 *image) {
    static const Guid acpi2 = {0x8868e871, 0xe4f1, 0x11d3, {0xbc, 0x22, 0, 0x80, 0xc7, 0x3c, 0x88, 0x81}};
    static const Guid acpi1 = {0xeb9d2d30, 0x2d88, 0x11d3, {0x9a, 0x16, 0, 0x90, 0x27, 0x3f, 0xc1, 0x4d}};
    u8 *root = 0, *old = 0;
    for (u64 i = 0; i < system->count; i++) {
        if (same((u8 *)&system->configuration[i].guid, (u8 *)&acpi2, 16)) root = system->configuration[i].table;
        if (same((u8 *)&system->configuration[i].guid, (u8 *)&acpi1, 16)) old = system->configuration[i].table;
    }
    if (!root || root[15] < 2) return u"the firmware has no ACPI 2.0 tables";
    u8 *list = (u8 *)get64(root + 24);
    if (!list || !same(list, (const u8 *)"XSDT", 4)) return u"the firmware has no XSDT";
    u32 length = get32(list + 4);
    if (length < 36 || length > 36 + 8 * 256) return u"the XSDT has no sensible length";
    u8 *dsdt;
    if (system->boot->allocate(9 /* ACPI reclaim */, parts.dsdt.size, (void **)&dsdt)) return u"there is no memory";
    copy(dsdt, image + parts.dsdt.offset, parts.dsdt.size);
    u32 end = 36;
    int fixed = 0;
    for (u32 at = 36; at + 8 <= length; at += 8) {
        u8 *table = (u8 *)get64(list + at);
        if (same(table, (const u8 *)"FACP", 4) && !fixed) {
            u32 size = get32(table + 4);
            if (size < 148 || size > 4096) return u"the FADT has no sensible length";
            put(table + 40, (u64)dsdt >> 32 ? 0 : (u64)dsdt, 4);
            put(table + 140, (u64)dsdt, 8);
            keep_ports(table, size);
            add_up(table, size, 9);
            fixed = 1;
        } else if (!kept(table)) {
            continue;
        }
        put(list + end, (u64)table, 8);
        end += 8;
    }
    if (!fixed) return u"the firmware has no FADT";
    put(list + 4, end, 4);
    add_up(list, end, 9);
    put(root + 16, 0, 4); /* no RSDT: the XSDT is the only list */
    add_up(root, 20, 8);
    add_up(root, 36, 32);
    if (old && old != root) {
        put(old + 16, 0, 4);
        add_up(old, 20, 8);
    }
    return 0;
}

static int named(const u16 *a, const u16 *b) {
    while (*a && *a == *b) a++, b++;
    return *a == *b;
}

/* The firmware's own GetVariable, while ours stands in its place. The one thing that is written to. */
__attribute__((section(".state"))) static GetVariable genuine = 0;

/* The kernel trusts a machine owner's keys only where boot is verified. Here the launch measurement verifies it, so the
 * answer to the kernel's two questions is yes; the firmware lets nobody set these variables. */
static FIRMWARE u64 say_verified(const u16 *name, const Guid *guid, u32 *attributes, u64 *size, void *data) {
    int verified = named(name, u"SecureBoot");
    if (!verified && !named(name, u"SetupMode")) return genuine(name, guid, attributes, size, data);
    if (!size || *size < 1 || !data) return 1ull << 63 | 5; /* EFI_BUFFER_TOO_SMALL */
    *size = 1;
    *(u8 *)data = verified;
    if (attributes) *attributes = 6;
    return 0;
}

/* Before the memory of this program goes, the firmware's own service is back in its place. */
static FIRMWARE void step_back(void *event, void *runtime) {
    (void)event;
    ((Runtime *)runtime)->get_variable = genuine;
}

/* Name the certificate of our drivers where the kernel looks for a machine owner's. Returns 0, or what is wrong. */
static const u16 *name_certificate(System *system, const u8 *image) {
    static const Guid shim = {0x605dab50, 0xe046, 0x4300, {0xab, 0xb6, 0x3d, 0xd8, 0x10, 0xdd, 0x8b, 0x23}};
    void *event;
    if (!parts.certificate.size) return 0;
    if (system->runtime->set_variable(u"MokListRT", &shim, 6 /* boot services and run time, not kept */,
                                      parts.certificate.size, image + parts.certificate.offset))
        return u"the certificate of the drivers cannot be named";
    genuine = system->runtime->get_variable;
    if (system->boot->create_event(0x201 /* exit of boot services */, 8, (void *)step_back, system->runtime, &event))
        return u"the firmware tells nobody when it ends";
    system->runtime->get_variable = say_verified;
    return 0;
}

static const u16 *start(void *handle, System *system) {
    static const Guid loaded_image = {0x5b1b31a1, 0x9562, 0x11d2, {0x8e, 0x3f, 0, 0xa0, 0xc9, 0x69, 0x72, 0x3b}};
    const u8 *image = (const u8 *)&parts - parts.here;
    const u16 *wrong;
    Loaded *own, *other;
    void *kernel = 0;
    /* UEFI 2.10, 10.3.4.3 and 10.3.1: memory-mapped device path, then its end */
    struct { u8 type, subtype; u16 size; u32 memory; u64 from, to; u8 end, entire; u16 end_size; } __attribute__((packed)) path;
    if ((wrong = replace_aml(system, image)) || (wrong = name_certificate(system, image))) return wrong;
    if (system->boot->handle_protocol(handle, &loaded_image, (void **)&own)) return u"there is no loaded image";
    path.type = 1, path.subtype = 3, path.size = 24, path.memory = 1;
    path.from = (u64)image + parts.kernel.offset, path.to = path.from + parts.kernel.size;
    path.end = 0x7f, path.entire = 0xff, path.end_size = 4;
    if (system->boot->load_image(0, handle, &path, image + parts.kernel.offset, parts.kernel.size, &kernel))
        return u"the kernel cannot be loaded";
    if (system->boot->handle_protocol(kernel, &loaded_image, (void **)&other)) return u"the kernel is no image";
    other->options = own->options;
    other->options_size = own->options_size;
    system->boot->start_image(kernel, 0, 0);
    return u"the kernel came back";
}

__attribute__((section(".text.first"))) FIRMWARE u64 enter(void *handle, System *system) {
    const u16 *wrong = start(handle, system);
    system->out->say(system->out, u"sealwright: stopped before the kernel: ");
    system->out->say(system->out, wrong);
    system->out->say(system->out, u"\r\n");
    system->runtime->reset(2 /* shutdown */, 0, 0, 0);
    for (;;) __asm__("hlt");
}
