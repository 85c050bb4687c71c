// Messages to TensorRT's logger, and the conversion of exceptions to messages at the plugin's interface.
#ifndef Y7_LOGGING_H
#define Y7_LOGGING_H

#include <exception>

namespace y7 {

// Stores the argument of setLoggerFinder, which TensorRT 8.6 and later call; null before the call.
void set_logger_finder(void* finder) noexcept;

// Writes an error to TensorRT's logger, or to stderr without a logger. `where` is the method that failed.
void log_error(const char* where, const char* what) noexcept;

// Returns body(). If it throws, logs the exception and returns `failure`.
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

#endif  // Y7_LOGGING_H
