#include "logging.h"

#include <cxxabi.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <typeinfo>

#include "params.h"
#include "tensorrt.h"

// In TensorRT 11 and TensorRT-RTX, ILogger and ILoggerFinder have a versioned base class: the same names, a different
// vtable. The plugin interfaces did not change, so one library works with TensorRT 10, 11 and RTX, and the headers it
// was compiled with do not determine which logger it gets at run time. The name of the finder's base class does.

namespace y7 {

// The two vtable layouts. These types are never created or destroyed. Their namespace has a name, because for a type
// that is local to this file the compiler would know that it has no implementation and would remove the calls.
namespace vtables {

struct PlainFinder {
  virtual void* find() = 0;

 protected:
  ~PlainFinder() = default;
};

struct PlainLogger {
  virtual void log(int32_t severity, const char* message) noexcept = 0;

 protected:
  ~PlainLogger() = default;
};

struct Versioned {
  virtual void language() = 0;
  virtual void interface_info() = 0;
  virtual void complete_destructor() = 0;
  virtual void deleting_destructor() = 0;

 protected:
  ~Versioned() = default;
};

struct VersionedFinder : Versioned {
  virtual void* find() = 0;

 protected:
  ~VersionedFinder() = default;
};

struct VersionedLogger : Versioned {
  virtual void log(int32_t severity, const char* message) noexcept = 0;

 protected:
  ~VersionedLogger() = default;
};

}  // namespace vtables

namespace {

constexpr const char* kPlainFinder = "N8nvinfer113ILoggerFinderE";
constexpr const char* kVersionedFinder = "N8nvinfer15v_1_013ILoggerFinderE";
constexpr int32_t kErrorSeverity = 1;  // ILogger::Severity::kERROR in every version

std::atomic<void*> logger_finder{nullptr};

#ifdef Y7_STATIC_REGISTRATION

// This library links libnvinfer, so its logger is the one of the headers.
bool log_to_tensorrt(const char* message) {
  nvinfer1::ILogger* logger = ::getLogger();
  if (logger != nullptr) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, message);
  }
  return logger != nullptr;
}

#else

// Returns whether the class of a polymorphic object or one of its bases has this mangled name; false without RTTI.
bool has_base(const void* object, const char* name) {
  const auto* vtable = *static_cast<const std::type_info* const* const*>(object);
  const std::type_info* type = vtable[-1];  // Itanium C++ ABI: the slot before the first function
  while (type != nullptr) {
    if (std::strcmp(type->name(), name) == 0) {
      return true;
    }
    const auto* derived = dynamic_cast<const abi::__si_class_type_info*>(type);
    type = derived == nullptr ? nullptr : derived->__base_type;
  }
  return false;
}

template <typename Finder, typename Logger>
bool log_with(void* finder, const char* message) {
  void* logger = static_cast<Finder*>(finder)->find();
  if (logger != nullptr) {
    static_cast<Logger*>(logger)->log(kErrorSeverity, message);
  }
  return logger != nullptr;
}

// Returns false without a logger and for a logger of unknown layout.
bool log_to_tensorrt(const char* message) {
  void* finder = logger_finder.load();
  if (finder == nullptr) {
    return false;
  }
  if (has_base(finder, kVersionedFinder)) {
    return log_with<vtables::VersionedFinder, vtables::VersionedLogger>(finder, message);
  }
  return has_base(finder, kPlainFinder) && log_with<vtables::PlainFinder, vtables::PlainLogger>(finder, message);
}

#endif

}  // namespace

void set_logger_finder(void* finder) noexcept { logger_finder.store(finder); }

void log_error(const char* where, const char* what) noexcept {
  char message[1024];
  std::snprintf(message, sizeof message, "%s plugin, %s: %s", kPluginName, where, what);
  try {
    if (log_to_tensorrt(message)) {
      return;
    }
  } catch (...) {  // the finder may throw; the message is then printed
  }
  std::fprintf(stderr, "%s\n", message);
}

}  // namespace y7
