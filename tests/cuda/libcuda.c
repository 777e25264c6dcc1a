/* A stand-in for libcuda that says what it is called with. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef void *H;
typedef unsigned long long P;
#define SAY(...) do { printf(__VA_ARGS__); printf("\n"); fflush(stdout); } while (0)
#define HOST(p) ((void *)(uintptr_t)(p))
static H stack[64];
static int depth;
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) { snprintf(s, n, "Stand-in"); return 0; }
int cuDeviceTotalMem_v2(size_t *n, int d) { *n = (size_t)80 << 30; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) {
    *v = a == 75 ? 9 : a == 76 ? 0 : a == 97 ? 232448 : a == 16 ? 132 : a == 115 ? 1 : -1;
    return 0;
}
int cuDevicePrimaryCtxRetain(H *c, int d) { *c = (H)0xC0; return 0; }
int cuCtxGetCurrent(H *c) { *c = depth ? stack[depth - 1] : 0; return 0; }
int cuCtxPushCurrent_v2(H c) { stack[depth++] = c; return 0; }
int cuCtxPopCurrent_v2(H *c) { *c = stack[--depth]; return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return depth ? 0 : 201; }
int cuCtxSynchronize(void) { SAY("context synchronize"); return 0; }
int cuMemPoolCreate(H *p, const int *props) {
    int rest = 0;
    for (int i = 4; i < 22; i++) rest |= props[i];
    SAY("pool type %d handles %d location %d %d rest %d", props[0], props[1], props[2], props[3], rest);
    *p = (H)0x90;
    return 0;
}
int cuMemPoolSetAttribute(H p, int a, P *v) { SAY("pool %p attribute %d = %llu", p, a, *v); return 0; }
int cuMemAllocFromPoolAsync(P *a, size_t n, H p, H s) {
    if (n > (size_t)1 << 40) return 2;
    *a = (P)(uintptr_t)aligned_alloc(256, (n + 255) / 256 * 256);
    SAY("alloc %zu pool %p stream %p", n, p, s);
    return 0;
}
int cuMemFreeAsync(P a, H s) { SAY("free stream %p", s); free(HOST(a)); return 0; }
int cuMemcpyHtoDAsync_v2(P d, const void *h, size_t n, H s) { memcpy(HOST(d), h, n); SAY("up %zu %p", n, s); return 0; }
int cuMemcpyDtoHAsync_v2(void *h, P d, size_t n, H s) { memcpy(h, HOST(d), n); SAY("down %zu %p", n, s); return 0; }
int cuMemsetD8Async(P d, unsigned char c, size_t n, H s) { memset(HOST(d), c, n); SAY("set %zu %p", n, s); return 0; }
int cuStreamSynchronize(H s) { SAY("synchronize %p", s); return 0; }
int cuStreamIsCapturing(H s, int *v) { *v = 0; return 0; }
int cuStreamCreate(H *s, unsigned f) { SAY("stream flags %u", f); *s = (H)0xA0; return 0; }
int cuEventCreate(H *e, unsigned f) { *e = (H)0xE0; SAY("event flags %u", f); return 0; }
int cuEventRecord(H e, H s) { SAY("record %p on %p", e, s); return 0; }
int cuStreamWaitEvent(H s, H e, unsigned f) { SAY("%p waits for %p, %u", s, e, f); return 0; }
int cuEventQuery(H e) { return 0; }
int cuEventSynchronize(H e) { SAY("wait for %p", e); return 0; }
int cuEventElapsedTime(float *ms, H a, H b) { SAY("from %p to %p", a, b); *ms = 1500; return 0; }
int cuEventElapsedTime_v2(float *ms, H a, H b) { return cuEventElapsedTime(ms, a, b); }
int cuThreadExchangeStreamCaptureMode(int *mode) { int before = *mode; *mode = 0; return before != 2 && before != 0; }
int cuEventDestroy_v2(H e) { SAY("destroy %p", e); return 0; }
int cuModuleLoadData(H *m, const char *image) { SAY("module of %.3s", image + 1); *m = (H)0x40; return 0; }
int cuModuleLoadDataEx(H *m, const char *image, unsigned n, int *o, void **v) {
    SAY("text %zu options %u: %d %d %zu", strlen(image), n, o[0], o[1], (size_t)v[1]);
    snprintf(v[0], (size_t)v[1], "line 1: bad text");
    return 218;
}
int cuModuleGetFunction(H *f, H m, const char *name) { SAY("function %s of %p", name, m); *f = (H)0xF0; return 0; }
int cuFuncGetAttribute(int *v, int a, H f) { SAY("%p attribute %d?", f, a); *v = 16; return 0; }
int cuFuncSetAttribute(H f, int a, int v) { SAY("%p attribute %d = %d", f, a, v); return 0; }
int cuPointerGetAttribute(int *v, int a, P p) { SAY("pointer %llu attribute %d?", p, a); *v = 0; return 0; }
int cuLaunchKernel(H f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   H s, void **params, void **extra) {
    SAY("launch %p grid %u %u %u block %u %u %u shared %u stream %p params %p", f, gx, gy, gz, bx, by, bz, shared, s,
        (void *)params);
    size_t size = *(size_t *)extra[3];
    SAY("extra %zu %zu end %p size %zu", (size_t)extra[0], (size_t)extra[2], extra[4], size);
    for (size_t i = 0; i < size / 8; i++) SAY("%016llx", ((P *)extra[1])[i]);
    return gx == 7 ? 701 : 0;
}
int cuGetErrorName(int e, const char **s) {
    *s = e == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : e == 218 ? "CUDA_ERROR_INVALID_PTX" : "CUDA_ERROR_OTHER";
    return 0;
}
int cuGetErrorString(int e, const char **s) { *s = "told by the driver"; return 0; }
int cuGetProcAddress_v2(const char *name, void **f, int version, P flags, int *status) {
    char newer[200];
    void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    snprintf(newer, sizeof newer, "%s_v2", name);
    *f = dlsym(self, newer);
    if (!*f) *f = dlsym(self, name);
    return *f ? 0 : 500;
}
int cuGetProcAddress(const char *name, void **f, int version, P flags) {
    return cuGetProcAddress_v2(name, f, version, flags, 0);
}
