// Threads of our own, for work at a time when ONNX Runtime lends none: while a session opens.
#pragma once

#include <cstddef>
#include <functional>

namespace vlrt {

// Calls a function for 0 .. count, in any order, on as many threads as this process may use cores, or as the system
// gives it. The function must not throw.
void on_all_cores(std::size_t count, const std::function<void(std::size_t)>& body);

}  // namespace vlrt
