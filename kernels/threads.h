// Work shared out to threads that live for one call.
#pragma once
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "simd.h"

// Call work(0) .. work(items - 1), each once, by at most `threads` threads, this one among them.
template <class F>
void share_out(i64 items, i64 threads, F work) {
  std::atomic<i64> next{0};
  const auto run = [&] {
    for (i64 i; (i = next++) < items;) work(i);
  };
  std::vector<std::thread> others;
  for (i64 i = 1; i < std::min(threads, items); ++i) others.emplace_back(run);
  run();
  for (auto& t : others) t.join();
}
