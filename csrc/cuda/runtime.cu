// What the CUDA runtime knows: the device, and the text of a status. Holds no kernel.

#include "primitives.cuh"

extern "C" {

// 0 if there is a device and a driver for it.
int pk_cuda_probe() {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        (void)cudaGetLastError();
        return pk::kCudaStatus + (int)error;
    }
    return count > 0 ? 0 : pk::kCudaStatus + (int)cudaErrorNoDevice;
}

int pk_cuda_set_device(int device) {
    cudaError_t error = cudaSetDevice(device);
    return error == cudaSuccess ? 0 : pk::kCudaStatus + (int)error;
}

// Bytes of shared memory that a block may have on a device; 0 if it cannot be asked.
int64_t pk_cuda_shared_limit(int64_t device) {
    int bytes = 0;
    cudaError_t error =
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, (int)device);
    if (error != cudaSuccess)
        (void)cudaGetLastError();
    return error == cudaSuccess ? bytes : 0;
}

const char* pk_cuda_status_text(int status) {
    if (status < pk::kCudaStatus)
        return pk::status_text(status);
    return cudaGetErrorString((cudaError_t)(status - pk::kCudaStatus));
}

const char* pk_cuda_architectures() { return PK_CUDA_ARCHITECTURES; }
}
