// libcudart: the functions that nvcc's host code calls when a program starts, so that programs with
// such code start, and queries of versions and devices. Kernels are not launched through the
// runtime's interface.
#include "shared.h"

extern "C" int cuInit(unsigned flags);
extern "C" int cuDeviceGetCount(int* count);
extern "C" int cuDriverGetVersion(int* version);
extern "C" int cuGetErrorName(int error, const char** name);
extern "C" int cuGetErrorString(int error, const char** text);

namespace {
void* nothing[2];
constexpr int NOT_SUPPORTED = 801;
}

EXPORT void** __cudaRegisterFatBinary(void*) { return nothing; }
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT char __cudaInitModule(void**) { return 0; }
EXPORT void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*,
                                   int*) {}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT void __cudaRegisterHostVar(void**, const char*, char*, size_t) {}
EXPORT void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}
EXPORT int __cudaGetKernel(void**, const void*) { return NOT_SUPPORTED; }
EXPORT int __cudaLaunchKernel() { return NOT_SUPPORTED; }
EXPORT int __cudaLaunchKernel_ptsz() { return NOT_SUPPORTED; }
EXPORT unsigned __cudaPushCallConfiguration() { return NOT_SUPPORTED; }
EXPORT int __cudaPopCallConfiguration() { return NOT_SUPPORTED; }

EXPORT int cudaRuntimeGetVersion(int* version) {
    *version = 13000;
    return 0;
}
EXPORT int cudaDriverGetVersion(int* version) { return cuDriverGetVersion(version); }

EXPORT int cudaGetDeviceCount(int* count) {
    const int result = cuInit(0);
    return result != 0 ? result : cuDeviceGetCount(count);
}

EXPORT int cudaGetLastError() { return 0; }
EXPORT int cudaPeekAtLastError() { return 0; }

EXPORT const char* cudaGetErrorName(int error) {
    const char* name = nullptr;
    cuGetErrorName(error, &name);
    return name == nullptr ? "unrecognized error code" : name;
}
EXPORT const char* cudaGetErrorString(int error) {
    const char* text = nullptr;
    cuGetErrorString(error, &text);
    return text == nullptr ? "unrecognized error code" : text;
}
