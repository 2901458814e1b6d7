/* A library to link with in place of NVIDIA's driver, which is not on the machine that builds: the
 * names that the engine's CUDA backend takes from it (ggml/src/ggml-cuda/ggml-cuda.cu), and no
 * code. Where the module runs, the driver's own libcuda.so.1 stands in its place. A name that is
 * missing here is an error when the module is linked. */
#define FROM_THE_DRIVER(name)                                                                      \
    int name(void) { return -1; }

FROM_THE_DRIVER(cuDeviceGet)
FROM_THE_DRIVER(cuDeviceGetAttribute)
FROM_THE_DRIVER(cuGetErrorString)
FROM_THE_DRIVER(cuMemAddressFree)
FROM_THE_DRIVER(cuMemAddressReserve)
FROM_THE_DRIVER(cuMemCreate)
FROM_THE_DRIVER(cuMemGetAllocationGranularity)
FROM_THE_DRIVER(cuMemMap)
FROM_THE_DRIVER(cuMemRelease)
FROM_THE_DRIVER(cuMemSetAccess)
FROM_THE_DRIVER(cuMemUnmap)
