// Messages to TensorRT's logger, and the wall that no exception passes.
#ifndef Y7_LOG_H
#define Y7_LOG_H

#include <exception>

namespace y7 {

// What TensorRT 8.6 and later pass to setLoggerFinder; null where nobody passed anything.
void set_logger_finder(void* finder) noexcept;

// Writes one error to TensorRT's logger, to stderr where there is none. `where` is the method that failed.
void log_error(const char* where, const char* what) noexcept;

// Runs a plugin method: an exception becomes a message and `failure`.
template <typename Result, typename Body>
Result guarded(const char* where, Result failure, const Body& body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    log_error(where, error.what());
  } catch (...) {
    log_error(where, "an exception of an unknown type");
  }
  return failure;
}

}  // namespace y7

#endif  // Y7_LOG_H
