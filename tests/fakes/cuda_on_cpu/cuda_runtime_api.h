// The toolkit version, for host files.
#ifndef CUDA_ON_CPU_CUDA_RUNTIME_API_H
#define CUDA_ON_CPU_CUDA_RUNTIME_API_H

#define CUDART_VERSION 13000

#endif  // CUDA_ON_CPU_CUDA_RUNTIME_API_H
