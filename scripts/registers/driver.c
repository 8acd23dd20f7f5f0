// A CUDA driver that has no GPU: memory is memory of the host, a launch computes nothing, and each module's PTX is kept.
// With it NVRTC compiles every kernel of a program as it does for an H100, and ptxas can be asked what it makes of them.
//
// Folder $REGISTERS receives N.ptx, the Nth module, and a line "N entry units shared_bytes" in launches.txt at the first
// launch of its kernel.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef unsigned long long Pointer;
typedef struct {
    int number, launched;
    char entry[256];
} Module;

static const char *folder(void) {
    const char *name = getenv("REGISTERS");
    return name ? name : ".";
}

// What is asked of the device.
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGet(int *device, int at) { return *device = at, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGetName(char *name, int size, int device) { return snprintf(name, size, "no GPU"), 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = (size_t)80 << 30, 0; }
int cuDeviceGetPCIBusId(char *id, int size, int device) { return snprintf(id, size, "0000:00:00.0"), 0; }
int cuDeviceGetUuid(char *id, int device) { return memset(id, 1, 16), 0; }
int cuDeviceGetUuid_v2(char *id, int device) { return memset(id, 1, 16), 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 1: case 2: case 3: *value = 1024; break;   // units of a block, in all and in two of its dimensions
    case 4: *value = 64; break;                     // in the third
    case 5: *value = 2147483647; break;             // blocks of a grid
    case 6: case 7: *value = 65535; break;
    case 8: *value = 49152; break;                  // shared memory of a block
    case 10: *value = 32; break;                    // units of a warp
    case 16: *value = 132; break;                   // processors
    case 75: *value = 9; break;                     // compute capability
    case 76: *value = 0; break;
    case 97: *value = 232448; break;                // shared memory that a block may ask for
    default: *value = 1;
    }
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, 0; }
int cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0; }
int cuMemGetInfo_v2(size_t *available, size_t *total) { return *available = *total = (size_t)80 << 30, 0; }

// Memory: pages come when they are touched, and a program touches few.
int cuMemAlloc_v2(Pointer *pointer, size_t bytes) {
    void *at = mmap(NULL, bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *pointer = (Pointer)(uintptr_t)at;
    return at == MAP_FAILED ? 2 : 0;
}
int cuMemAllocAsync(Pointer *pointer, size_t bytes, void *stream) { return cuMemAlloc_v2(pointer, bytes); }
int cuMemAllocHost_v2(void **pointer, size_t bytes) {
    *pointer = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096 + 4096);
    return *pointer ? 0 : 2;
}
int cuMemFreeHost(void *pointer) { return free(pointer), 0; }
static int copy(void *to, const void *from, size_t bytes) { return memcpy(to, from, bytes), 0; }
int cuMemcpyHtoDAsync_v2(Pointer to, const void *from, size_t bytes, void *stream) {
    return copy((void *)(uintptr_t)to, from, bytes);
}
int cuMemcpyDtoHAsync_v2(void *to, Pointer from, size_t bytes, void *stream) {
    return copy(to, (void *)(uintptr_t)from, bytes);
}
int cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void *stream) {
    return copy((void *)(uintptr_t)to, (void *)(uintptr_t)from, bytes);
}
// CUDA_MEMCPY2D, of which memory type 1 is the host's.
typedef struct {
    size_t from_x, from_y;
    int from_type;
    const char *from_host;
    Pointer from_device;
    void *from_array;
    size_t from_pitch, to_x, to_y;
    int to_type;
    char *to_host;
    Pointer to_device;
    void *to_array;
    size_t to_pitch, width, height;
} Copy2D;
int cuMemcpy2DAsync_v2(const Copy2D *c, void *stream) {
    const char *from = c->from_type == 1 ? c->from_host : (const char *)(uintptr_t)c->from_device;
    char *to = c->to_type == 1 ? c->to_host : (char *)(uintptr_t)c->to_device;
    for (size_t row = 0; row < c->height; row++) memcpy(to + row * c->to_pitch, from + row * c->from_pitch, c->width);
    return 0;
}

// Modules: one kernel each.
int cuModuleLoadData(void **module, const void *image) {
    static int count = 0;
    Module *made = calloc(1, sizeof *made);
    char name[4096];
    made->number = count++;
    const char *entry = strstr(image, ".entry ");
    if (entry) sscanf(entry + 7, "%255[^( \n]", made->entry);
    snprintf(name, sizeof name, "%s/%d.ptx", folder(), made->number);
    FILE *file = fopen(name, "w");
    if (!file) return 999;
    fputs(image, file);
    fclose(file);
    return *module = made, 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) { return *function = module, 0; }
int cuLaunchKernel(Module *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned x, unsigned y, unsigned z,
                   unsigned shared, void *stream, void **arguments, void **extra) {
    if (kernel->launched++) return 0;
    char name[4096];
    snprintf(name, sizeof name, "%s/launches.txt", folder());
    FILE *file = fopen(name, "a");
    if (!file) return 999;
    fprintf(file, "%d %s %u %u\n", kernel->number, kernel->entry, x * y * z, shared);
    return fclose(file), 0;
}
int cuGetErrorName(int error, const char **text) { return *text = "none", 0; }
int cuGetErrorString(int error, const char **text) { return *text = "a driver without a GPU", 0; }

// What makes something that nobody looks into.
#define MAKES(name) int name(void **made) { return *made = (void *)1, 0; }
MAKES(cuStreamCreate) MAKES(cuStreamCreateWithPriority) MAKES(cuEventCreate) MAKES(cuGraphInstantiateWithFlags)
MAKES(cuGraphInstantiate_v2)
int cuStreamEndCapture(void *stream, void **graph) { return *graph = (void *)1, 0; }
int cuGraphGetNodes(void *graph, void **nodes, size_t *count) { return *count = 0; }
int cuStreamIsCapturing(void *stream, int *status) { return *status = 0; }
int cuEventElapsedTime(float *time, void *a, void *b) { return *time = 1.0f, 0; }
int cuEventElapsedTime_v2(float *time, void *a, void *b) { return *time = 1.0f, 0; }

// What has nothing to do.
#define NOTHING(name) int name(void) { return 0; }
NOTHING(cuInit) NOTHING(cuDevicePrimaryCtxRelease_v2) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSynchronize)
NOTHING(cuMemFree_v2) NOTHING(cuMemFreeAsync) NOTHING(cuMemsetD8Async) NOTHING(cuModuleUnload)
NOTHING(cuFuncSetAttribute) NOTHING(cuLaunchKernelEx) NOTHING(cuStreamDestroy_v2) NOTHING(cuStreamSynchronize)
NOTHING(cuStreamWaitEvent) NOTHING(cuStreamQuery) NOTHING(cuEventDestroy_v2) NOTHING(cuEventRecord)
NOTHING(cuEventSynchronize) NOTHING(cuEventQuery) NOTHING(cuTensorMapEncodeTiled) NOTHING(cuStreamBeginCapture_v2)
NOTHING(cuThreadExchangeStreamCaptureMode) NOTHING(cuGraphLaunch) NOTHING(cuGraphUpload) NOTHING(cuGraphDestroy)
NOTHING(cuGraphExecDestroy)
