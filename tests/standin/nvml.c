/* A stand-in for libnvidia-ml.so.1: GPUs that exist only in a file, for the real pynvml to talk to.
 *
 * The file, named by NVML_STANDIN, is one fixed structure that every process with this library maps, so that they share
 * a server; each call holds a lock on it. What a card is and how it can be cut comes from tables.h, which
 * tests/nvml_standin.py writes from recipes/mig.yaml. Functions named nvml* answer as the driver does, and those named
 * standin_* are the test's own hands.
 *
 * With OLD_DRIVER it is a driver of the R470 kind: newer functions and profiles are not there, and it says nothing
 * about the geometry of a card whose MIG mode is off.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef uint32_t u32;
typedef uint64_t u64;
typedef uintptr_t Handle; /* NVML's opaque pointers */
_Static_assert(sizeof(Handle) == 8, "a handle is a number of 64 bits");

enum { /* what the driver's functions return */
    SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 6, INSUFFICIENT_SIZE,
    DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, RESET_REQUIRED, LIB_RM_VERSION_MISMATCH = 18, IN_USE,
    INSUFFICIENT_RESOURCES = 23, VERSION_MISMATCH = 25,
};
enum { AMPERE = 7, NODE = 40, SYSTEM = 50, P2P_OK = 0, P2P_NO_CHIPSET = 1, P2P_NO = 5, NO_INSTANCE = 0xffffffff };
enum { GPUS = 64, INSTANCES = 8, COMPUTES = 8, PROFILES = 18, STARTS = 12, LINKS = 36, PROCESSES = 64, FAULTS = 32, CLIENTS = 16 };
enum { NOBODY = -2, SWITCH = -1, PROCEED = -1, FOREVER = -1 };
#define MIB ((u64)1024 * 1024)
#define RESERVED (512 * MIB) /* what the driver keeps of a whole card */
#ifdef OLD_DRIVER
enum { OLD = true, CUDA = 11040, PROFILE_COUNT = 8 }; /* up to 1_SLICE_REV1 */
#define DRIVER "470.82.01"
#define CUDA_MAJOR "11"
#else
enum { OLD = false, CUDA = 13000, PROFILE_COUNT = PROFILES };
#define DRIVER "580.95.05"
#define CUDA_MAJOR "13"
#endif

/* --- the cards ----------------------------------------------------------------------------------------------------- */

enum Media { PLAIN, ONE_ME, GFX, NO_ME, ALL_ME }; /* a profile's suffix: none, +me, +gfx, -me, +me.all */
typedef struct {
    const char *name;
    u32 index, id, most, memory_mib, multiprocessors, slices, size;
    enum Media media;
    u32 count, starts[STARTS];
} Profile;
typedef struct {
    const char *name, *product;
    u32 device, architecture, major, minor, memory_mib, limit_mw, idle_mw, links;
    bool ecc, p2p, is_numa_node;
    u32 compute_slices, memory_units;
    Profile profiles[PROFILES];
} Card;
#include "tables.h" /* static const Card CARDS[] */

/* --- the server ---------------------------------------------------------------------------------------------------- */

typedef struct { u32 serial, id, start, slices, index; } Compute; /* absent where serial is 0, as below */
typedef struct { u32 serial, id, profile, start, sm; Compute computes[COMPUTES]; } Instance; /* sm: percent at work */
typedef struct {
    u32 card;
    char uuid[48];
    long long mig_current, mig_pending, passthrough, lost, power_mw, limit_mw, temperature, utilization,
        memory_utilization, numa, persistence, counts_energy, energy_uj, since_ms,
        corrected, uncorrected, corrected_before, uncorrected_before; /* ECC errors since and before the last reset */
    Instance instances[INSTANCES];
} Gpu;
typedef struct {
    u32 pid, gpu, instance, compute; /* the last two are serials, or 0 on the whole GPU */
    int graphics, hidden;
    u32 sm;
    u64 used;
    char name[64];
} Process;
typedef struct { char symbol[64]; int code, after, times; } Fault;
typedef struct {
    u32 size, count, last_serial;
    long long stable_uuids, unprivileged, mismatch, skipped_ms, frozen_at_ms, gpm_samples; /* how many are not freed */
    int ancestor[GPUS][GPUS], p2p[GPUS][GPUS], links[GPUS][GPUS];
    Gpu gpus[GPUS];
    Process processes[PROCESSES];
    pid_t clients[CLIENTS];
    Fault faults[FAULTS];
} Server;

typedef struct { Server *server; int file; } Mapping;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* flock does not part the threads of a process */
static Mapping client = {NULL, -1};                       /* from the first nvmlInit to the last nvmlShutdown */
static u32 references;                                    /* how many nvmlInit are open */
static Server *server;                                    /* which the present call is about */

#define EACH(item, array) \
    for (__typeof__(&(array)[0]) item = (array); item < (array) + sizeof(array) / sizeof(array)[0]; item++)
#define EACH_INSTANCE(item, gpu) EACH(item, (gpu)->instances) if (item->serial)
#define EACH_COMPUTE(item, instance) EACH(item, (instance)->computes) if (item->serial)
#define EACH_PROCESS(item) EACH(item, server->processes) if (item->pid)
#define EACH_PROFILE(item, card) EACH(item, (card)->profiles) if (item->name && item->index < PROFILE_COUNT)
#define CHECK(code) do { int code_ = (code); if (code_) return code_; } while (0)
#define NEED(condition) do { if (!(condition)) return INVALID_ARGUMENT; } while (0)

static void detach(Mapping *mapping) {
    if (mapping->server)
        munmap(mapping->server, sizeof(Server));
    if (mapping->file >= 0)
        close(mapping->file); /* and with it goes the lock */
    *mapping = (Mapping){NULL, -1};
}

static Mapping attach(const char *path) {
    struct stat status;
    Mapping found = {NULL, path ? open(path, O_RDWR | O_CLOEXEC) : -1};
    if (found.file >= 0 && !fstat(found.file, &status) && status.st_size == sizeof(Server)) {
        void *at = mmap(NULL, sizeof(Server), PROT_READ | PROT_WRITE, MAP_SHARED, found.file, 0);
        found.server = at == MAP_FAILED ? NULL : at;
    }
    if (!found.server || found.server->size != sizeof(Server))
        detach(&found);
    return found;
}

static void enter(Mapping mapping) {
    server = mapping.server;
    if (mapping.file >= 0)
        flock(mapping.file, LOCK_EX);
}

static bool lock(void) {
    pthread_mutex_lock(&mutex);
    enter(client);
    return true;
}

static void leave(const bool *held) {
    (void)held;
    server = NULL;
    if (client.file >= 0)
        flock(client.file, LOCK_UN);
    pthread_mutex_unlock(&mutex);
}

static int injected(const char *symbol) { /* what a test wants this call to answer, or PROCEED */
    EACH(fault, server->faults) {
        if (!fault->times || strcmp(fault->symbol, symbol))
            continue;
        if (!fault->after) {
            fault->times -= fault->times != FOREVER;
            return fault->code;
        }
        fault->after--;
    }
    return PROCEED;
}

static int admit(const char *symbol, bool privileged) {
    if (!references)
        return UNINITIALIZED;
    int code = injected(symbol);
    return code == PROCEED && privileged && server->unprivileged ? NO_PERMISSION : code;
}

/* Every function of the driver begins with one of these; what they take is let go when it returns. */
#define CALL(privileged) \
    __attribute__((cleanup(leave), unused)) bool held_ = lock(); \
    do { int code_ = admit(__func__, privileged); if (code_ != PROCEED) return code_; } while (0)
#define CALL_ON(handle, kinds, out, privileged) \
    CALL(privileged); \
    Target t; \
    CHECK(resolve(handle, kinds, &t)); \
    NEED(out)
#define ASK(handle, kinds, out) CALL_ON(handle, kinds, out, false)
#define CHANGE(handle, kinds, out) CALL_ON(handle, kinds, out, true) /* needs privileges; some only read */

static long long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    long long ms = now.tv_sec * 1000LL + now.tv_nsec / 1000000;
    return (server->frozen_at_ms ? server->frozen_at_ms : ms) + server->skipped_ms;
}

static Gpu *settled(Gpu *gpu) { /* with its energy counter brought up to now */
    long long now = now_ms();
    gpu->energy_uj += gpu->power_mw * (now - gpu->since_ms); /* mW · ms = µJ */
    gpu->since_ms = now;
    return gpu;
}

static void reset(Gpu *gpu) { /* what a reset of the GPU and a fresh driver have in common */
    settled(gpu)->energy_uj = 0;
    gpu->corrected_before += gpu->corrected;
    gpu->uncorrected_before += gpu->uncorrected;
    gpu->corrected = gpu->uncorrected = 0;
    memset(gpu->instances, 0, sizeof gpu->instances);
}

static bool occupied(u32 gpu, u32 compute) { /* its serial; 0: any */
    EACH_PROCESS(p)
        if (p->gpu == gpu && (!compute || p->compute == compute))
            return true;
    return false;
}

/* --- handles ------------------------------------------------------------------------------------------------------- */

enum { PHYSICAL = 1, MIG = 2, INSTANCE = 4, COMPUTE = 8, CUT = 16 }; /* what a handle is of; CUT: MIG mode on */
typedef struct {
    u32 number;
    Gpu *gpu;
    const Card *card;
    Instance *instance;
    const Profile *profile; /* of the instance */
    Compute *compute;
} Target;

static Handle handle_of(u32 kind, u32 gpu, u32 serial) { return (Handle)kind << 48 | (Handle)gpu << 40 | serial; }
static const Profile *profile_of(const Gpu *gpu, const Instance *i) { return &CARDS[gpu->card].profiles[i->profile]; }
static Target target_of(u32 n) { return (Target){n, &server->gpus[n], &CARDS[server->gpus[n].card], NULL, NULL, NULL}; }

static bool next(Target *t) { /* go to the following MIG device of the same GPU, or to its first */
    u32 k = !t->compute ? 0 : (t->instance - t->gpu->instances) * COMPUTES + (t->compute - t->instance->computes) + 1;
    for (; k < INSTANCES * COMPUTES; k++) {
        t->instance = &t->gpu->instances[k / COMPUTES];
        t->profile = profile_of(t->gpu, t->instance);
        t->compute = &t->instance->computes[k % COMPUTES];
        if (t->instance->serial && t->compute->serial)
            return true;
    }
    return false;
}

/* No serial is used twice, so that a handle of something destroyed stays invalid. */
static int resolve(Handle handle, u32 kinds, Target *t) {
    u32 kind = handle >> 48, number = handle >> 40 & 0xff, serial = (u32)handle;
    NEED((kind & kinds) && number < server->count);
    *t = target_of(number);
    if (t->gpu->lost)
        return GPU_IS_LOST;
    if (kind == PHYSICAL)
        return kinds & CUT && !t->gpu->mig_current ? NOT_SUPPORTED : SUCCESS;
    EACH_INSTANCE(i, t->gpu)
        if (kind == INSTANCE && i->serial == serial) {
            t->instance = i;
            t->profile = profile_of(t->gpu, i);
            return SUCCESS;
        }
    while (kind != INSTANCE && next(t))
        if (t->compute->serial == serial)
            return SUCCESS;
    return INVALID_ARGUMENT;
}

static int text(char *out, u32 length, const char *value) {
    return snprintf(out, length, "%s", value) < (int)length ? SUCCESS : INSUFFICIENT_SIZE;
}

/* The driver's are name-based (version 5), too. These change with each creation, unless stable_uuids is set. */
static void mig_uuid(const Target *t, char out[48]) {
    char seed[128];
    u64 half[2] = {0xcbf29ce484222325, 0x9e3779b97f4a7c15};
    snprintf(seed, sizeof seed, "%s/%u/%u/%u", t->gpu->uuid, t->instance->id, t->compute->id,
             server->stable_uuids ? 0 : t->compute->serial);
    for (const char *c = seed; *c; c++)
        EACH(part, half)
            *part = ((*part ^ (unsigned char)*c) * 0x100000001b3) ^ *part >> 29;
    snprintf(out, 48, "MIG-%08x-%04x-5%03x-%04x-%012llx", (u32)(half[0] >> 32), (u32)half[0] >> 16,
             (u32)half[0] & 0xfff, (u32)(half[1] >> 48 & 0x3fff) | 0x8000, half[1] & 0xffffffffffffULL);
}

static void slice_name(const Profile *profile, u32 slices, char out[96]) {
    if (slices == profile->slices)
        snprintf(out, 96, "MIG %s", profile->name);
    else
        snprintf(out, 96, "MIG %uc.%s", slices, profile->name);
}

/* --- geometry ------------------------------------------------------------------------------------------------------ */

static bool may_start(const Profile *profile, u32 start) {
    for (u32 k = 0; k < profile->count; k++)
        if (profile->starts[k] == start)
            return true;
    return false;
}

static bool fits(const Gpu *gpu, const Profile *wanted, u32 start) {
    u32 slices = wanted->slices, same = 0;
    EACH_INSTANCE(i, gpu) {
        const Profile *there = profile_of(gpu, i);
        slices += there->slices;
        same += there == wanted;
        if (start < i->start + there->size && i->start < start + wanted->size)
            return false;
        if ((wanted->media == ONE_ME && there->media == ONE_ME) || (wanted->media == ALL_ME && there->media != NO_ME)
            || (there->media == ALL_ME && wanted->media != NO_ME))
            return false;
    }
    return may_start(wanted, start) && slices <= CARDS[gpu->card].compute_slices && same < wanted->most;
}

/* Ids are those of a binary tree over the card's memory: the whole 0, its halves 1 and 2, and so on. */
static Instance *place(Gpu *gpu, const Profile *profile, u32 start, u32 serial) {
    const Card *card = &CARDS[gpu->card];
    Instance *i = gpu->instances;
    while (i->serial) i++;
    *i = (Instance){serial, card->memory_units / profile->size - 1 + start / profile->size, profile - card->profiles,
                    start, 0, {{0}}};
    return i;
}

/* The n-th start that the driver tries of itself. On eight units it is as transcripts from A100s show. */
static u32 preferred(const Card *card, u32 n) {
    static const u32 OF_EIGHT[] = {6, 4, 5, 7, 0, 1, 2, 3};
    return card->memory_units == 8 ? OF_EIGHT[n] : (n + card->memory_units / 2) % card->memory_units;
}

static const Profile *profile_by_id(const Card *card, u32 id) {
    EACH_PROFILE(p, card)
        if (p->id == id)
            return p;
    return NULL;
}

static int profile_by_index(const Target *t, u32 index, bool in_mig_mode_only, const Profile **found) {
    NEED(index < PROFILE_COUNT);
    EACH_PROFILE(p, t->card)
        if (p->index == index && (t->gpu->mig_current || !in_mig_mode_only)) {
            *found = p;
            return SUCCESS;
        }
    return NOT_SUPPORTED;
}

enum { COMPUTE_PROFILES = 9 }; /* the ids of compute instance profiles are their numbers */

static u32 slices_of(const Profile *profile, u32 number) { /* 0 where such a GPU instance has no such profile */
    static const u32 SLICES[COMPUTE_PROFILES] = {1, 2, 3, 4, 7, 8, 6};
    bool odd = SLICES[number] == 3 && profile->slices == 4; /* a 4g can be 1c, 2c or 4c */
    return SLICES[number] <= profile->slices && !odd ? SLICES[number] : 0;
}

static Compute *occupy(Target *t, u32 slices) { /* a new compute instance, or NULL */
    bool taken[8] = {false}, ids[COMPUTES] = {false}, indexes[INSTANCES * COMPUTES] = {false};
    Compute made = {.slices = slices}, *at = t->instance->computes;
    Target other = target_of(t->number);
    while (next(&other)) {
        indexes[other.compute->index] = true; /* so indexes keep their holes until these are filled again */
        if (other.instance == t->instance) {
            ids[other.compute->id] = true;
            memset(taken + other.compute->start, true, other.compute->slices);
        }
    }
    while (made.start + slices <= t->profile->slices && memchr(taken + made.start, true, slices)) made.start++;
    if (made.start + slices > t->profile->slices)
        return NULL;
    while (ids[made.id]) made.id++;
    while (indexes[made.index]) made.index++;
    while (at->serial) at++;
    made.serial = ++server->last_serial;
    *at = made;
    return at;
}

/* --- functions of the driver: the library -------------------------------------------------------------------------- */

static bool others_look(void) { /* whether another process has the library open: it is a client of every GPU */
    EACH(pid, server->clients)
        if (*pid && *pid != getpid() && !kill(*pid, 0))
            return true;
    return false;
}

static void note_client(bool open) {
    pid_t own = getpid();
    EACH(pid, server->clients)
        if (open ? !*pid || *pid == own || kill(*pid, 0) : *pid == own) {
            *pid = open ? own : 0;
            return;
        }
}

static int initialize(const char *symbol) {
    __attribute__((cleanup(leave), unused)) bool held = lock();
    if (!references) {
        client = attach(getenv("NVML_STANDIN"));
        enter(client);
    }
    int code = !server ? DRIVER_NOT_LOADED : server->mismatch ? LIB_RM_VERSION_MISMATCH : injected(symbol);
    if (code == PROCEED || code == SUCCESS)
        references++;
    if (references == 1)
        note_client(true);
    if (!references)
        detach(&client);
    return code == PROCEED ? SUCCESS : code;
}

int nvmlInit_v2(void) { return initialize(__func__); }
int nvmlInitWithFlags(u32 flags) { (void)flags; return initialize(__func__); }

int nvmlShutdown(void) {
    CALL(false);
    if (!--references) {
        note_client(false);
        detach(&client);
    }
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    static const struct { int code; const char *text; } TEXTS[] = {
        {SUCCESS, "Success"}, {UNINITIALIZED, "Uninitialized"}, {INVALID_ARGUMENT, "Invalid Argument"},
        {NOT_SUPPORTED, "Not Supported"}, {NO_PERMISSION, "Insufficient Permissions"}, {NOT_FOUND, "Not Found"},
        {INSUFFICIENT_SIZE, "Insufficient Size"}, {DRIVER_NOT_LOADED, "Driver Not Loaded"},
        {GPU_IS_LOST, "GPU is lost"}, {RESET_REQUIRED, "GPU requires reset"},
        {LIB_RM_VERSION_MISMATCH, "Driver/library version mismatch"}, {IN_USE, "In use by another client"},
        {INSUFFICIENT_RESOURCES, "Insufficient Resources"}, {VERSION_MISMATCH, "Argument Version Mismatch"},
    };
    EACH(known, TEXTS)
        if (known->code == code)
            return known->text;
    return "Unknown Error";
}

int nvmlSystemGetDriverVersion(char *out, u32 length) { CALL(false); return text(out, length, DRIVER); }
int nvmlSystemGetNVMLVersion(char *out, u32 length) { CALL(false); return text(out, length, CUDA_MAJOR "." DRIVER); }
int nvmlSystemGetCudaDriverVersion(int *out) { CALL(false); *out = CUDA; return SUCCESS; }
#ifndef OLD_DRIVER
int nvmlSystemGetCudaDriverVersion_v2(int *out) { CALL(false); *out = CUDA; return SUCCESS; }
#endif

int nvmlSystemGetProcessName(u32 pid, char *name, u32 length) {
    CALL(false);
    EACH_PROCESS(p)
        if (p->pid == pid)
            return text(name, length, p->name);
    return NOT_FOUND;
}

/* --- which devices there are --------------------------------------------------------------------------------------- */

int nvmlDeviceGetCount_v2(u32 *count) { CALL(false); *count = server->count; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(u32 index, Handle *device) {
    ASK(handle_of(PHYSICAL, index < GPUS ? index : GPUS, 0), PHYSICAL, device);
    *device = handle_of(PHYSICAL, index, 0);
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Handle *device) {
    CALL(false);
    NEED(uuid && device);
    for (u32 number = 0; number < server->count; number++) {
        Target t = target_of(number);
        if (!strcmp(uuid, t.gpu->uuid)) {
            *device = handle_of(PHYSICAL, number, 0);
            return t.gpu->lost ? GPU_IS_LOST : SUCCESS;
        }
        while (!t.gpu->lost && next(&t)) {
            char made[48], legacy[80];
            mig_uuid(&t, made);
            snprintf(legacy, sizeof legacy, "MIG-%s/%u/%u", t.gpu->uuid, t.instance->id, t.compute->id);
            if (!strcmp(uuid, made) || !strcmp(uuid, legacy)) {
                *device = handle_of(MIG, number, t.compute->serial);
                return SUCCESS;
            }
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(Handle device, char *uuid, u32 length) {
    char made[48];
    ASK(device, PHYSICAL | MIG, uuid);
    if (t.compute)
        mig_uuid(&t, made);
    return text(uuid, length, t.compute ? made : t.gpu->uuid);
}

int nvmlDeviceGetName(Handle device, char *name, u32 length) {
    char slice[96] = "", whole[192];
    ASK(device, PHYSICAL | MIG, name);
    if (t.compute)
        slice_name(t.profile, t.compute->slices, slice);
    snprintf(whole, sizeof whole, "%s%s%s", t.card->product, *slice ? " " : "", slice);
    return text(name, length, whole);
}

typedef struct {
    char legacy_bus_id[16];
    u32 domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} PciInfo;

static u32 bus_of(u32 number) { return 0x17 + 0x12 * number; }
static int pci_info(u32 bus, u32 device_id, PciInfo *out) {
    *out = (PciInfo){.bus = bus, .device_id = device_id << 16 | 0x10de, .subsystem_id = 0x146310de};
    snprintf(out->legacy_bus_id, sizeof out->legacy_bus_id, "0000:%02X:00.0", bus & 0xff);
    snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", bus & 0xff);
    return SUCCESS;
}

int nvmlDeviceGetPciInfo_v3(Handle device, PciInfo *pci) {
    ASK(device, PHYSICAL, pci);
    return pci_info(bus_of(t.number), t.card->device, pci);
}

/* --- plain readings ------------------------------------------------------------------------------------------------ */

#define READING(function, kinds, type, supported, value) /* a function that answers one number of its target, t */ \
    int function(Handle device, type *out) { \
        ASK(device, kinds, out); \
        if (!(supported)) \
            return NOT_SUPPORTED; \
        *out = (type)(value); \
        return SUCCESS; \
    }
#define READINGS(function, kinds, type, supported, first, second) /* and one that answers two */ \
    int function(Handle device, type *out, type *other) { \
        ASK(device, kinds, out && other); \
        if (!(supported)) \
            return NOT_SUPPORTED; \
        *out = (type)(first); \
        *other = (type)(second); \
        return SUCCESS; \
    }

READING(nvmlDeviceGetIndex, PHYSICAL, u32, true, t.number)
READING(nvmlDeviceGetMinorNumber, PHYSICAL, u32, true, t.number)
READING(nvmlDeviceGetArchitecture, PHYSICAL, u32, true, t.card->architecture)
READING(nvmlDeviceGetPersistenceMode, PHYSICAL, u32, true, t.gpu->persistence)
READING(nvmlDeviceGetPowerUsage, PHYSICAL, u32, true, t.gpu->power_mw)
READING(nvmlDeviceGetEnforcedPowerLimit, PHYSICAL, u32, true, t.gpu->limit_mw)
READING(nvmlDeviceGetPowerManagementLimit, PHYSICAL, u32, true, t.gpu->limit_mw)
READING(nvmlDeviceGetPowerManagementDefaultLimit, PHYSICAL, u32, true, t.card->limit_mw)
READING(nvmlDeviceGetTotalEnergyConsumption, PHYSICAL, u64, t.gpu->counts_energy, settled(t.gpu)->energy_uj / 1000)
READING(nvmlDeviceGetMaxMigDeviceCount, PHYSICAL, u32, true, t.gpu->mig_current ? t.card->compute_slices : 0)
READING(nvmlDeviceIsMigDeviceHandle, PHYSICAL | MIG, u32, true, t.compute != NULL)
READING(nvmlDeviceGetDeviceHandleFromMigDeviceHandle, MIG, Handle, true, handle_of(PHYSICAL, t.number, 0))
READING(nvmlDeviceGetGpuInstanceId, MIG, u32, true, t.instance->id)
READING(nvmlDeviceGetComputeInstanceId, MIG, u32, true, t.compute->id)
#ifndef OLD_DRIVER
READING(nvmlDeviceGetNumaNodeId, PHYSICAL, u32, t.gpu->numa >= 0, t.gpu->numa) /* only where a GPU is itself a node */
#endif
READINGS(nvmlDeviceGetCudaComputeCapability, PHYSICAL | MIG, int, true, t.card->major, t.card->minor)
READINGS(nvmlDeviceGetPowerManagementLimitConstraints, PHYSICAL, u32, true, t.card->limit_mw / 4, t.card->limit_mw)
READINGS(nvmlDeviceGetEccMode, PHYSICAL, u32, t.card->ecc, 1, 1)
READINGS(nvmlDeviceGetMigMode, PHYSICAL, u32, t.card->compute_slices, t.gpu->mig_current, t.gpu->mig_pending)

int nvmlDeviceGetUtilizationRates(Handle device, u32 gpu_memory[2]) {
    ASK(device, PHYSICAL, gpu_memory);
    gpu_memory[0] = t.gpu->utilization;
    gpu_memory[1] = t.gpu->memory_utilization;
    return t.gpu->mig_current ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetTemperature(Handle device, u32 sensor, u32 *degrees) {
    ASK(device, PHYSICAL, degrees && !sensor);
    *degrees = t.gpu->temperature;
    return SUCCESS;
}

#ifndef OLD_DRIVER
typedef struct { u32 version, sensor; int degrees; } Temperature;
int nvmlDeviceGetTemperatureV(Handle device, Temperature *out) {
    ASK(device, PHYSICAL, out && !out->sensor);
    out->degrees = t.gpu->temperature;
    return out->version == (sizeof *out | 1 << 24) ? SUCCESS : VERSION_MISMATCH;
}
#endif

int nvmlDeviceGetTotalEccErrors(Handle device, u32 uncorrected, u32 aggregate, u64 *count) {
    ASK(device, PHYSICAL, count && uncorrected < 2 && aggregate < 2);
    *count = uncorrected ? t.gpu->uncorrected : t.gpu->corrected;
    if (aggregate)
        *count += uncorrected ? t.gpu->uncorrected_before : t.gpu->corrected_before;
    return t.card->ecc ? SUCCESS : NOT_SUPPORTED;
}

typedef struct { u32 version; u64 total, reserved, free, used; } Memory;

static int memory(const Target *t, Memory *out) {
    if (!t->compute && t->gpu->mig_current && server->unprivileged)
        return NO_PERMISSION;
    out->total = (t->compute ? t->profile->memory_mib : t->card->memory_mib) * MIB;
    out->reserved = t->compute ? 0 : RESERVED;
    out->used = 0;
    EACH_PROCESS(p)
        if (p->gpu == t->number && (!t->compute || p->instance == t->instance->serial))
            out->used += p->used;
    out->free = out->total - out->reserved - out->used;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Handle device, u64 total_free_used[3]) {
    Memory m;
    ASK(device, PHYSICAL | MIG, total_free_used);
    CHECK(memory(&t, &m));
    total_free_used[0] = m.total;
    total_free_used[1] = m.free;
    total_free_used[2] = m.used + m.reserved;
    return SUCCESS;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(Handle device, Memory *out) {
    ASK(device, PHYSICAL | MIG, out);
    return out->version == (sizeof *out | 2 << 24) ? memory(&t, out) : VERSION_MISMATCH;
}
#endif

typedef struct {
    u32 field, scope;
    int64_t timestamp, latency;
    u32 type;
    int code;
    union { u32 small; u64 large; } value;
} FieldValue;

static int field_value(const Target *t, FieldValue *out) {
    enum { SMALL = 1, LARGE = 3 };
    bool of_gpu = !out->scope, averages = t->card->architecture != AMPERE; /* of Ampere, only GA100 is modelled */
    out->type = SMALL;
    switch (out->field) {
    case 83: case 191: /* energy */
        out->type = LARGE;
        out->value.large = settled(t->gpu)->energy_uj / 1000;
        return of_gpu && t->gpu->counts_energy ? SUCCESS : NOT_SUPPORTED;
    case 91: out->value.small = t->card->links; return SUCCESS;
    case 185: out->value.small = t->gpu->power_mw; return of_gpu && averages ? SUCCESS : NOT_SUPPORTED;
    case 186: out->value.small = t->gpu->power_mw; return of_gpu ? SUCCESS : NOT_SUPPORTED;
    case 187: out->value.small = t->card->limit_mw / 4; return SUCCESS;
    case 188: case 189: out->value.small = t->card->limit_mw; return SUCCESS;
    case 190: case 192: out->value.small = t->gpu->limit_mw; return SUCCESS;
    default: return NOT_SUPPORTED;
    }
}

int nvmlDeviceGetFieldValues(Handle device, int count, FieldValue *values) {
    ASK(device, PHYSICAL, values && count > 0);
    for (FieldValue *v = values; v < values + count; v++) {
        v->timestamp = (int64_t)time(NULL) * 1000000;
        v->latency = 0;
        v->code = field_value(&t, v);
    }
    return SUCCESS;
}

typedef struct { u32 pid; u64 used; u32 instance, compute; } ProcessInfo;

static int processes(const Target *t, bool graphics, u32 *count, ProcessInfo *out) {
    u32 room = out ? *count : 0;
    if (!t->compute && t->gpu->mig_current && server->unprivileged)
        return NO_PERMISSION;
    *count = 0;
    EACH_PROCESS(p) {
        Target at;
        bool here = p->gpu == t->number && (!t->compute || p->compute == t->compute->serial);
        if (!here || p->hidden || p->graphics != graphics)
            continue;
        bool inside = !resolve(handle_of(COMPUTE, p->gpu, p->compute), COMPUTE, &at);
        if (*count < room)
            out[*count] = (ProcessInfo){p->pid, p->used, inside ? at.instance->id : NO_INSTANCE,
                                        inside ? at.compute->id : NO_INSTANCE};
        ++*count;
    }
    return *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

#define PROCESS_LIST(function, graphics) \
    int function(Handle device, u32 *count, ProcessInfo *out) { \
        ASK(device, PHYSICAL | MIG, count); \
        return processes(&t, graphics, count, out); \
    }

PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v2, false)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, true)
#ifndef OLD_DRIVER
PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v3, false)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, true)
#endif

typedef struct { u32 pid; u64 at; u32 sm, memory, encoder, decoder; } ProcessSample;

/* One sample of each process that computes, newer than any that was seen before. */
int nvmlDeviceGetProcessUtilization(Handle device, ProcessSample *out, u32 *count, u64 since) {
    ASK(device, PHYSICAL, count);
    u32 room = out ? *count : 0;
    if (t.gpu->mig_current)
        return NOT_SUPPORTED;
    *count = 0;
    EACH_PROCESS(p) {
        if (p->gpu != t.number || p->hidden)
            continue;
        if (*count < room)
            out[*count] = (ProcessSample){p->pid, since + 1, p->sm, 0, 0, 0};
        ++*count;
    }
    return !*count ? NOT_FOUND : *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

#ifndef OLD_DRIVER
typedef struct { u32 version, is_supported; } GpmSupport;
typedef struct { u32 serial; } GpmSample; /* of which instance */
typedef struct { u32 id; int code; double value; const char *names[3]; } GpmMetric;
typedef struct { u32 version, count; GpmSample *before, *now; GpmMetric metrics[]; } GpmMetrics;

int nvmlGpmQueryDeviceSupport(Handle device, GpmSupport *out) {
    ASK(device, PHYSICAL, out);
    out->is_supported = t.card->architecture > AMPERE + 1; /* Hopper and later */
    return SUCCESS;
}

int nvmlGpmSampleAlloc(GpmSample **out) {
    CALL(false);
    *out = calloc(1, sizeof **out);
    server->gpm_samples++;
    return SUCCESS;
}

int nvmlGpmSampleFree(GpmSample *sample) {
    CALL(false);
    free(sample);
    server->gpm_samples--;
    return SUCCESS;
}

int nvmlGpmMigSampleGet(Handle device, u32 instance, GpmSample *out) {
    ASK(device, PHYSICAL | CUT, out);
    EACH_INSTANCE(i, t.gpu)
        if (i->id == instance) {
            out->serial = i->serial;
            return SUCCESS;
        }
    return NOT_FOUND;
}

int nvmlGpmMetricsGet(GpmMetrics *asked) {
    CALL(false);
    NEED(asked->version == 1 && asked->count == 1 && asked->before->serial == asked->now->serial);
    asked->metrics[0].code = NOT_FOUND;
    EACH(gpu, server->gpus)
        EACH_INSTANCE(i, gpu)
            if (i->serial == asked->now->serial && asked->metrics[0].id == 2) { /* SM_UTIL */
                asked->metrics[0].value = i->sm;
                asked->metrics[0].code = SUCCESS;
            }
    return SUCCESS;
}
#endif

/* --- how the GPUs are joined --------------------------------------------------------------------------------------- */

int nvmlDeviceGetTopologyCommonAncestor(Handle one, Handle two, u32 *level) {
    Target other;
    ASK(one, PHYSICAL, level);
    CHECK(resolve(two, PHYSICAL, &other));
    *level = server->ancestor[t.number][other.number]; /* 0, the same board, of a GPU and itself */
    return SUCCESS;
}

int nvmlDeviceGetP2PStatus(Handle one, Handle two, u32 capability, u32 *status) {
    enum { NVLINK = 2, CAPABILITIES = 5 };
    Target other;
    ASK(one, PHYSICAL, status && capability < CAPABILITIES);
    CHECK(resolve(two, PHYSICAL, &other));
    NEED(t.number != other.number);
    *status = server->p2p[t.number][other.number];
    if (capability == NVLINK)
        *status = server->links[t.number][other.number] ? P2P_OK : P2P_NO;
    if (t.gpu->mig_current || other.gpu->mig_current)
        *status = P2P_NO;
    return SUCCESS;
}

static int peer(const Target *t, u32 link) { /* the number of a GPU, SWITCH or NOBODY */
    for (u32 other = 0; other < server->count; other++) {
        int links = server->links[t->number][other];
        if (links == SWITCH || (int)link < links)
            return links == SWITCH ? SWITCH : (int)other;
        link -= links;
    }
    return NOBODY;
}

#define ASK_LINK(device, link, out) \
    ASK(device, PHYSICAL, (out) && link < LINKS); \
    if (link >= t.card->links) \
        return NOT_SUPPORTED; \
    int other = peer(&t, link)

int nvmlDeviceGetNvLinkState(Handle device, u32 link, u32 *active) {
    ASK_LINK(device, link, active);
    *active = other != NOBODY;
    return SUCCESS;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(Handle device, u32 link, u32 *type) {
    ASK_LINK(device, link, type);
    *type = other == SWITCH ? 2 : 0;
    return other == NOBODY ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(Handle device, u32 link, PciInfo *pci) {
    enum { SWITCH_BUS = 0xc5, SWITCHES = 6, NVSWITCH = 0x22a3 };
    ASK_LINK(device, link, pci);
    if (other == SWITCH)
        return pci_info(SWITCH_BUS + link % SWITCHES, NVSWITCH, pci);
    return other == NOBODY ? NOT_SUPPORTED : pci_info(bus_of(other), target_of(other).card->device, pci);
}

/* --- MIG mode and GPU instances ------------------------------------------------------------------------------------ */

int nvmlDeviceSetMigMode(Handle device, u32 mode, u32 *activation) {
    CHANGE(device, PHYSICAL, activation && mode <= 1);
    if (!t.card->compute_slices)
        return NOT_SUPPORTED;
    bool busy = occupied(t.number, 0) || (t.card->architecture == AMPERE && others_look());
    EACH_INSTANCE(i, t.gpu)
        busy = true;
    t.gpu->mig_pending = mode;
    *activation = SUCCESS;
    if (t.gpu->mig_current == mode)
        return SUCCESS;
    if (t.gpu->passthrough || busy) {
        *activation = t.gpu->passthrough ? RESET_REQUIRED : IN_USE; /* of the virtual machine; by another client */
        return SUCCESS;
    }
    t.gpu->mig_current = mode;
    if (t.card->architecture == AMPERE)
        reset(t.gpu);
    return SUCCESS;
}

#define PROFILE_FIELDS \
    u32 id, p2p, slices, instances, multiprocessors, copy_engines, decoders, encoders, jpegs, ofas; u64 memory_mib;
#define PROFILE_VALUES(p) .id = p->id, .slices = p->slices, .instances = p->most, .memory_mib = p->memory_mib, \
    .multiprocessors = p->multiprocessors, .copy_engines = p->slices
typedef struct { PROFILE_FIELDS } ProfileInfo;
typedef struct { u32 version; PROFILE_FIELDS char name[96]; } ProfileInfo2;
typedef struct { u32 start, size; } Placement;

int nvmlDeviceGetGpuInstanceProfileInfo(Handle device, u32 profile, ProfileInfo *out) {
    const Profile *p;
    ASK(device, PHYSICAL, out);
    CHECK(profile_by_index(&t, profile, OLD, &p));
    *out = (ProfileInfo){PROFILE_VALUES(p)};
    return SUCCESS;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetGpuInstanceProfileInfoV(Handle device, u32 profile, ProfileInfo2 *out) {
    const Profile *p;
    ASK(device, PHYSICAL, out);
    if (out->version != (sizeof *out | 2 << 24))
        return VERSION_MISMATCH;
    CHECK(profile_by_index(&t, profile, true, &p));
    *out = (ProfileInfo2){.version = out->version, PROFILE_VALUES(p)};
    slice_name(p, p->slices, out->name);
    return SUCCESS;
}
#endif

/* The driver trusts the array to be large enough. Here `count` says how large it is, and is held to it. */
int nvmlDeviceGetGpuInstancePossiblePlacements_v2(Handle device, u32 profile, Placement *out, u32 *count) {
    CHANGE(device, PHYSICAL, count);
    const Profile *p = profile_by_id(t.card, profile);
    if (!p || (OLD && !t.gpu->mig_current))
        return NOT_SUPPORTED;
    u32 room = *count;
    *count = p->count;
    if (out && room < p->count)
        return INSUFFICIENT_SIZE;
    for (u32 k = 0; out && k < p->count; k++)
        out[k] = (Placement){p->starts[k], p->size};
    return SUCCESS;
}

int nvmlDeviceGetGpuInstanceRemainingCapacity(Handle device, u32 profile, u32 *count) {
    CHANGE(device, PHYSICAL | CUT, count);
    const Profile *p = profile_by_id(t.card, profile);
    if (!p)
        return NOT_SUPPORTED;
    Gpu trial = *t.gpu;
    *count = 0;
    for (u32 start = 0; start < t.card->memory_units; start++)
        if (fits(&trial, p, start))
            *count += place(&trial, p, start, 1)->serial;
    return SUCCESS;
}

static int create(const Target *t, u32 profile, const Placement *at, Handle *out) {
    const Profile *p = profile_by_id(t->card, profile);
    NEED(p && (!at || (at->size == p->size && may_start(p, at->start))));
    EACH_PROCESS(q)
        if (q->gpu == t->number && q->graphics && !q->instance)
            return IN_USE; /* as with a display server on a workstation's card */
    for (u32 n = 0; n < (at ? 1 : t->card->memory_units); n++) {
        u32 start = at ? at->start : preferred(t->card, n);
        if (fits(t->gpu, p, start)) {
            *out = handle_of(INSTANCE, t->number, place(t->gpu, p, start, ++server->last_serial)->serial);
            return SUCCESS;
        }
    }
    return INSUFFICIENT_RESOURCES;
}

int nvmlDeviceCreateGpuInstance(Handle device, u32 profile, Handle *instance) {
    CHANGE(device, PHYSICAL | CUT, instance);
    return create(&t, profile, NULL, instance);
}

int nvmlDeviceCreateGpuInstanceWithPlacement(Handle device, u32 profile, const Placement *at, Handle *instance) {
    CHANGE(device, PHYSICAL | CUT, at && instance);
    return create(&t, profile, at, instance);
}

int nvmlDeviceGetGpuInstances(Handle device, u32 profile, Handle *out, u32 *count) {
    CHANGE(device, PHYSICAL | CUT, out && count && profile_by_id(t.card, profile));
    *count = 0;
    EACH_INSTANCE(i, t.gpu)
        if (profile_of(t.gpu, i)->id == profile)
            out[(*count)++] = handle_of(INSTANCE, t.number, i->serial);
    return SUCCESS;
}

int nvmlDeviceGetGpuInstanceById(Handle device, u32 id, Handle *out) {
    CHANGE(device, PHYSICAL | CUT, out);
    EACH_INSTANCE(i, t.gpu)
        if (i->id == id) {
            *out = handle_of(INSTANCE, t.number, i->serial);
            return SUCCESS;
        }
    return NOT_FOUND;
}

typedef struct { Handle device; u32 id, profile; Placement placement; } InstanceInfo;

int nvmlGpuInstanceGetInfo(Handle instance, InstanceInfo *out) {
    ASK(instance, INSTANCE, out);
    *out = (InstanceInfo){handle_of(PHYSICAL, t.number, 0), t.instance->id, t.profile->id,
                          {t.instance->start, t.profile->size}};
    return SUCCESS;
}

int nvmlGpuInstanceDestroy(Handle instance) {
    CHANGE(instance, INSTANCE, true);
    EACH_COMPUTE(c, t.instance)
        return IN_USE; /* so, too, while a process is in one of them */
    t.instance->serial = 0;
    return SUCCESS;
}

/* --- compute instances and MIG devices ----------------------------------------------------------------------------- */

#define COMPUTE_FIELDS \
    u32 id, slices, instances, multiprocessors, copy_engines, decoders, encoders, jpegs, ofas;
#define COMPUTE_VALUES(profile, number, wanted) .id = number, .slices = wanted, .instances = profile->slices / wanted, \
    .multiprocessors = multiprocessors(profile, wanted), .copy_engines = profile->slices
typedef struct { COMPUTE_FIELDS } ComputeProfileInfo;
typedef struct { u32 version; COMPUTE_FIELDS char name[96]; } ComputeProfileInfo2;

static u32 multiprocessors(const Profile *of, u32 slices) { return of->multiprocessors * slices / of->slices; }

#define NEED_SLICES(number, engine) \
    NEED(number < COMPUTE_PROFILES && !(engine)); \
    u32 slices = slices_of(t.profile, number); \
    if (!slices) \
        return NOT_SUPPORTED

int nvmlGpuInstanceGetComputeInstanceProfileInfo(Handle instance, u32 profile, u32 engine, ComputeProfileInfo *out) {
    ASK(instance, INSTANCE, out);
    NEED_SLICES(profile, engine);
    *out = (ComputeProfileInfo){COMPUTE_VALUES(t.profile, profile, slices)};
    return SUCCESS;
}

#ifndef OLD_DRIVER
int nvmlGpuInstanceGetComputeInstanceProfileInfoV(Handle instance, u32 profile, u32 engine, ComputeProfileInfo2 *out) {
    ASK(instance, INSTANCE, out);
    if (out->version != (sizeof *out | 2 << 24))
        return VERSION_MISMATCH;
    NEED_SLICES(profile, engine);
    *out = (ComputeProfileInfo2){.version = out->version, COMPUTE_VALUES(t.profile, profile, slices)};
    slice_name(t.profile, slices, out->name);
    return SUCCESS;
}
#endif

int nvmlGpuInstanceCreateComputeInstance(Handle instance, u32 profile, Handle *out) {
    CHANGE(instance, INSTANCE, out);
    NEED_SLICES(profile, 0);
    const Compute *made = occupy(&t, slices);
    if (!made)
        return INSUFFICIENT_RESOURCES;
    *out = handle_of(COMPUTE, t.number, made->serial);
    return SUCCESS;
}

int nvmlGpuInstanceGetComputeInstances(Handle instance, u32 profile, Handle *out, u32 *count) {
    CHANGE(instance, INSTANCE, out && count);
    NEED_SLICES(profile, 0);
    *count = 0;
    EACH_COMPUTE(c, t.instance)
        if (c->slices == slices)
            out[(*count)++] = handle_of(COMPUTE, t.number, c->serial);
    return SUCCESS;
}

int nvmlGpuInstanceGetComputeInstanceById(Handle instance, u32 id, Handle *out) {
    CHANGE(instance, INSTANCE, out);
    EACH_COMPUTE(c, t.instance)
        if (c->id == id) {
            *out = handle_of(COMPUTE, t.number, c->serial);
            return SUCCESS;
        }
    return NOT_FOUND;
}

typedef struct { Handle device, instance; u32 id, profile; Placement placement; } ComputeInfo;

int nvmlComputeInstanceGetInfo_v2(Handle compute, ComputeInfo *out) {
    u32 profile = 0;
    ASK(compute, COMPUTE, out);
    while (slices_of(t.profile, profile) != t.compute->slices) profile++;
    *out = (ComputeInfo){handle_of(PHYSICAL, t.number, 0), handle_of(INSTANCE, t.number, t.instance->serial),
                         t.compute->id, profile, {t.compute->start, t.compute->slices}};
    return SUCCESS;
}

int nvmlComputeInstanceDestroy(Handle compute) {
    CHANGE(compute, COMPUTE, true);
    if (occupied(t.number, t.compute->serial))
        return IN_USE;
    t.compute->serial = 0;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Handle device, u32 index, Handle *out) {
    ASK(device, PHYSICAL | CUT, out && index < t.card->compute_slices);
    while (next(&t))
        if (t.compute->index == index) {
            *out = handle_of(MIG, t.number, t.compute->serial);
            return SUCCESS;
        }
    return NOT_FOUND;
}

typedef struct {
    u32 multiprocessors, copy_engines, decoders, encoders, jpegs, ofas, instance_slices, compute_slices;
    u64 memory_mib;
} Attributes;

int nvmlDeviceGetAttributes_v2(Handle device, Attributes *out) {
    ASK(device, PHYSICAL | MIG, out);
    if (!t.compute)
        return NOT_SUPPORTED;
    *out = (Attributes){.multiprocessors = multiprocessors(t.profile, t.compute->slices),
                        .copy_engines = t.profile->slices, .instance_slices = t.profile->slices,
                        .compute_slices = t.compute->slices, .memory_mib = t.profile->memory_mib};
    return SUCCESS;
}

/* --- the test's own hands: they return a number below 0 where they cannot do it ------------------------------------ */

static Mapping visit(const char *path) {
    pthread_mutex_lock(&mutex);
    Mapping found = attach(path);
    enter(found);
    return found;
}

static void depart(Mapping *mapping) {
    server = NULL;
    detach(mapping);
    pthread_mutex_unlock(&mutex);
}

#define HAND(path, condition) \
    __attribute__((cleanup(depart), unused)) Mapping held_ = visit(path); \
    if (!server || !(condition)) return -1

int standin_create(const char *path) {
    static const Server FRESH = {.size = sizeof(Server)};
    unlink(path); /* whoever has it mapped keeps the old one */
    int file = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    bool done = file >= 0 && write(file, &FRESH, sizeof FRESH) == sizeof FRESH;
    if (file >= 0)
        close(file);
    return done ? 0 : -1;
}

int standin_add_gpu(const char *path, const char *name, const char *uuid) {
    HAND(path, server->count < GPUS);
    EACH(card, CARDS) {
        u32 number = server->count;
        if (strcmp(card->name, name))
            continue;
        server->gpus[number] = (Gpu){
            .card = card - CARDS, .power_mw = card->idle_mw, .limit_mw = card->limit_mw, .temperature = 35,
            .persistence = 1, .counts_energy = 1, .numa = card->is_numa_node ? (int)number : -1, .since_ms = now_ms()};
        snprintf(server->gpus[number].uuid, sizeof server->gpus[number].uuid, "%s", uuid);
        for (u32 other = 0; other < number; other++) {
            bool p2p = card->p2p && target_of(other).card->p2p;
            server->ancestor[number][other] = server->ancestor[other][number] = number / 4 == other / 4 ? NODE : SYSTEM;
            server->p2p[number][other] = server->p2p[other][number] = p2p ? P2P_OK : P2P_NO_CHIPSET;
        }
        return server->count++;
    }
    return -1;
}

static long long *setting(u32 gpu, const char *name) { /* of the whole server where there is no such GPU */
#define SETTING(of, field) if (!strcmp(name, #field)) return &(of)->field
    if (gpu >= server->count) {
        SETTING(server, stable_uuids); SETTING(server, unprivileged); SETTING(server, mismatch);
        SETTING(server, skipped_ms); SETTING(server, frozen_at_ms); SETTING(server, gpm_samples);
        return NULL;
    }
    Gpu *of = settled(&server->gpus[gpu]);
    SETTING(of, mig_current); SETTING(of, mig_pending); SETTING(of, passthrough); SETTING(of, lost);
    SETTING(of, power_mw); SETTING(of, limit_mw); SETTING(of, energy_uj); SETTING(of, counts_energy);
    SETTING(of, temperature); SETTING(of, utilization); SETTING(of, memory_utilization); SETTING(of, numa);
    SETTING(of, persistence); SETTING(of, corrected); SETTING(of, uncorrected);
    return NULL;
}

int standin_set(const char *path, u32 gpu, const char *name, long long value) {
    HAND(path, setting(gpu, name));
    *setting(gpu, name) = value;
    return 0;
}

int standin_get(const char *path, u32 gpu, const char *name, long long *value) {
    HAND(path, setting(gpu, name));
    *value = *setting(gpu, name);
    return 0;
}

int standin_join(const char *path, u32 a, u32 b, const char *how, int value) {
    HAND(path, a < server->count && b < server->count && a != b);
    int (*table)[GPUS] = !strcmp(how, "links") ? server->links : !strcmp(how, "p2p") ? server->p2p : server->ancestor;
    table[a][b] = table[b][a] = value;
    return 0;
}

/* A slice that somebody else made: MIG mode on, a GPU instance, one compute instance over all of it. */
int standin_carve(const char *path, u32 gpu, const char *profile, u32 start) {
    HAND(path, gpu < server->count);
    Target t = target_of(gpu);
    EACH_PROFILE(p, t.card)
        if (!strcmp(p->name, profile) && fits(t.gpu, p, start)) {
            t.gpu->mig_current = t.gpu->mig_pending = 1;
            t.instance = place(t.gpu, p, start, ++server->last_serial);
            t.profile = p;
            return occupy(&t, p->slices) ? 0 : -1;
        }
    return -1;
}

int standin_clear(const char *path, u32 gpu) {
    HAND(path, gpu < server->count && !occupied(gpu, 0));
    memset(server->gpus[gpu].instances, 0, sizeof server->gpus[gpu].instances);
    return 0;
}

/* The n-th slice: the profile's name, where it starts, the UUID of the MIG device over all of it, or nothing. */
int standin_slice(const char *path, u32 gpu, u32 n, char name[96], u32 *start, char uuid[48]) {
    HAND(path, gpu < server->count);
    Target t = target_of(gpu);
    EACH_INSTANCE(i, t.gpu) {
        if (n--)
            continue;
        snprintf(name, 96, "%s", profile_of(t.gpu, i)->name);
        *start = i->start;
        *uuid = 0;
        while (next(&t))
            if (t.instance == i && t.compute->slices == t.profile->slices)
                mig_uuid(&t, uuid);
        return 0;
    }
    return -1;
}

/* `slice` is the name of a profile, or NULL for the whole GPU; the process is in its first compute instance. */
int standin_run(const char *path, u32 gpu, u32 pid, const char *name, int graphics, int hidden, u64 used,
                const char *slice, u32 start) {
    HAND(path, gpu < server->count && pid);
    Target t = target_of(gpu);
    Process made = {.pid = pid, .gpu = gpu, .graphics = graphics, .hidden = hidden, .used = used};
    snprintf(made.name, sizeof made.name, "%s", name);
    while (slice && !made.compute && next(&t))
        if (!strcmp(t.profile->name, slice) && t.instance->start == start) {
            made.instance = t.instance->serial;
            made.compute = t.compute->serial;
        }
    EACH(at, server->processes)
        if (!at->pid && (!slice || made.compute)) {
            *at = made;
            return 0;
        }
    return -1;
}

/* How much of the multiprocessors it could use a process keeps at work. */
int standin_work(const char *path, u32 pid, u32 percent) {
    int found = -1;
    HAND(path, pid);
    EACH_PROCESS(p)
        if (p->pid == pid) {
            p->sm = percent;
            EACH_INSTANCE(i, &server->gpus[p->gpu])
                if (i->serial == p->instance)
                    i->sm = percent;
            found = 0;
        }
    return found;
}

int standin_end(const char *path, u32 pid) {
    int ended = -1;
    HAND(path, pid);
    EACH_PROCESS(p)
        if (p->pid == pid)
            ended = p->pid = 0;
    return ended;
}

int standin_reboot(const char *path) {
    HAND(path, true);
    memset(server->processes, 0, sizeof server->processes);
    server->mismatch = 0;
    for (Gpu *gpu = server->gpus; gpu < server->gpus + server->count; gpu++) {
        bool keeps_mode = CARDS[gpu->card].architecture == AMPERE || gpu->passthrough;
        gpu->mig_current = gpu->mig_pending = keeps_mode ? gpu->mig_pending : 0;
        gpu->lost = 0;
        reset(gpu);
    }
    return 0;
}

int standin_mend(const char *path) { /* forget all faults */
    HAND(path, true);
    memset(server->faults, 0, sizeof server->faults);
    return 0;
}

int standin_fail(const char *path, const char *symbol, int code, int after, int times) {
    HAND(path, true);
    EACH(fault, server->faults)
        if (!fault->times) {
            *fault = (Fault){"", code, after, times};
            snprintf(fault->symbol, sizeof fault->symbol, "%s", symbol);
            return 0;
        }
    return -1;
}
