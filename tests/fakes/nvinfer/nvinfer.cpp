// A libnvinfer for TensorRT's real Python bindings of every version: one object that answers every virtual call.
//
// The interfaces of NvInfer.h are objects with a virtual table that forward to a second object, `mImpl`, the first
// member. Here both are the same object, and every slot of its table is the function `answer`. The address of the
// object is a valid answer of every type: as a pointer the object itself, as a bool true, as an integer 131073, as a
// text the few characters of its first bytes. Dimensions are returned in memory of the caller, which comes before
// `this` in the arguments: they are one dimension of size 1. So this answers calls of versions whose headers it has
// never seen.
//
// nvinfer_use_runtimes replaces the runtimes, and so their engines and contexts, by objects of the caller
// (functional_nvinfer.py).
//
// For x86-64, where the first two arguments of every call are in the same two registers.
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <typeinfo>
#include <utility>

namespace {
constexpr std::uintptr_t BASE = 0x20000;  // above vm.mmap_min_addr; low, so that it is a small integer
constexpr std::uintptr_t OBJECT = BASE + 1;
constexpr std::uintptr_t TABLE = BASE + 0x6160;  // its bytes are ASCII, since the object starts with this address
constexpr std::size_t BYTES = 1 << 20, MEMBERS = 64, SLOTS = 512, DIMENSIONS = 8;

class Anything {};

int calls;     // virtual calls so far
int refusing;  // they return false and null

void* (*create_runtime)(void* logger);

std::uintptr_t answer(std::uintptr_t first, std::uintptr_t second) {
  ++calls;
  if (first == OBJECT) {
    return refusing ? 0 : OBJECT;
  }
  if (second != OBJECT) {
    std::abort();  // a call on an object that does not come from here
  }
  // Dims32 of TensorRT 8 are nine int32, Dims64 an int32 and eight int64. Only the first size is read.
  std::int32_t sizes[1 + DIMENSIONS] = {1, 1, 1};
  std::memcpy(reinterpret_cast<void*>(first), sizes, sizeof(sizes));
  return first;
}

template <std::size_t slot>
std::uintptr_t call(std::uintptr_t first, std::uintptr_t second) {
  return answer(first, second);
}

template <std::size_t... slots>
void fill(std::uintptr_t* table, std::index_sequence<slots...>) {
  const std::uintptr_t functions[] = {reinterpret_cast<std::uintptr_t>(&call<slots>)...};
  std::memcpy(table, functions, sizeof(functions));
}

void* object() {
  static const bool made = [] {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
    void* const base = reinterpret_cast<void*>(BASE);
    if (mmap(base, BYTES, PROT_READ | PROT_WRITE, flags, -1, 0) != base) {
      std::abort();
    }
    // Before the functions: the offset of the whole object, and its type, which pybind11 asks for.
    auto* const table = reinterpret_cast<std::uintptr_t*>(TABLE);
    table[-2] = 0;
    table[-1] = reinterpret_cast<std::uintptr_t>(&typeid(Anything));
    fill(table, std::make_index_sequence<SLOTS>());
    std::uintptr_t members[MEMBERS];
    for (std::uintptr_t& member : members) {
      member = OBJECT;
    }
    members[0] = TABLE;
    std::memcpy(reinterpret_cast<void*>(OBJECT), members, sizeof(members));
    return true;
  }();
  (void)made;
  return reinterpret_cast<void*>(OBJECT);
}
}  // namespace

// The parsers of TensorRT 8 that the product does not use.
namespace nvuffparser {
enum class FieldType : int;
struct FieldMap {
  FieldMap(const char*, const void*, FieldType, int);
};
FieldMap::FieldMap(const char*, const void*, FieldType, int) {}
void* createUffParser() { return nullptr; }
}  // namespace nvuffparser
namespace nvcaffeparser1 {
void* createCaffeParser() { return nullptr; }
void shutdownProtobufLibrary() {}
}  // namespace nvcaffeparser1

extern "C" {
void* createInferBuilder_INTERNAL(void*, int) { return object(); }
void* createInferRefitter_INTERNAL(void*, void*, int) { return object(); }
void* createInferRuntime_INTERNAL(void* logger, int) { return create_runtime ? create_runtime(logger) : object(); }
void* createNvOnnxParser_INTERNAL(void*, void*, int) { return object(); }
void* createNvOnnxParserRefitter_INTERNAL(void*, void*, int) { return object(); }
void* getBuilderPluginRegistry(int) { return object(); }
void* getPluginRegistry() { return object(); }
bool initLibNvInferPlugins(void*, const char*) { return true; }
int getNvOnnxParserVersion() { return 1; }

int nvinfer_calls() { return calls; }
void nvinfer_refuse(int value) { refusing = value; }
void nvinfer_use_runtimes(void* (*create)(void* logger)) { create_runtime = create; }
// The type of an object whose class the bindings do not know, for the table of such an object.
const void* nvinfer_type() { return &typeid(Anything); }
}
