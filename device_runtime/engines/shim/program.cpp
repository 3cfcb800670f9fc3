// ExecuTorch programs behind a C interface, so that Python needs ctypes and numpy where it would need PyTorch.
//
// The interface holds for one version of ExecuTorch only: its C++ classes are compiled in. `built_for` says which.
// Functions return 0, or an ExecuTorch error code whose story `spafl_message` tells. Not for several threads at once.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/platform/platform.h>

// the wheel ships the library that defines these, and no header that declares them
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

using executorch::aten::ScalarType;
using executorch::extension::BufferDataLoader;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::DataLoader;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::MethodMeta;
using executorch::runtime::Span;

namespace {

constexpr int kMaxRank = 8;
constexpr size_t kAlignment = 64;  // what a delegate may ask of the weights inside a program

thread_local std::string message;

struct Free {
  void operator()(uint8_t* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<uint8_t, Free>;

// Programs and data are copied: ExecuTorch reads them for as long as it runs, and keeps no reference.
Memory copy_of(const void* data, size_t size) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, size ? size : 1) != 0) return nullptr;
  std::memcpy(memory, data, size);
  return Memory(static_cast<uint8_t*>(memory));
}

// A method's planned memory, for the largest batch. From calloc, whose pages cost nothing until they are written to:
// small batches write to few. The vectors that Module would allocate are cleared, and so cost all of it at once.
struct Planned {
  std::vector<Memory> blocks;
  std::vector<Span<uint8_t>> spans;
  std::unique_ptr<HierarchicalAllocator> allocator;
};

struct Program {
  Memory bytes, data;
  std::map<std::string, Planned> planned;  // before `module`, which uses it until it is destroyed
  std::unique_ptr<Module> module;
  std::vector<EValue> outputs;
};

int failed(Error error) {
  // the runtime's last log line says what went wrong; its code alone says little
  if (message.empty()) message = executorch::runtime::to_string(error);
  return static_cast<int>(error);
}

int failed(Error error, const std::string& why) {
  message = why;
  return static_cast<int>(error);
}

void remember(
    et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* text, size_t length) {
  if (level == kError || level == kFatal) message.assign(text, length);
  if (level == kFatal) std::fprintf(stderr, "executorch: %.*s\n", static_cast<int>(length), text);
}

// As soon as this library is loaded: the runtime would write its log to standard error.
[[maybe_unused]] const bool registered = executorch::runtime::register_pal(
    executorch::runtime::PalImpl::create(remember, "program.cpp"));

}  // namespace

extern "C" {

// An array of the caller's: dtype is ExecuTorch's ScalarType. Of outputs, `data` may be null: see spafl_run.
struct SpaflArray {
  void* data;
  uint64_t bytes;
  int32_t dtype;
  int32_t rank;
  int32_t sizes[kMaxRank];
};

// What this library was compiled against: as given to the compiler, the version and the runtime's fingerprint.
const char* spafl_built_for() { return SPAFL_BUILT_FOR; }

// Why the last call failed.
const char* spafl_message() { return message.c_str(); }

// Returns how many threads the operators use from now on, in every program of this process.
int spafl_use_threads(int threads) {
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (pool == nullptr) return 1;
  if (static_cast<int>(pool->get_thread_count()) != threads) {
    pool->_unsafe_reset_threadpool(static_cast<uint32_t>(threads));
  }
  return static_cast<int>(pool->get_thread_count());
}

// Opens a program from its bytes, and the weights beside it if there are any; both are copied.
int spafl_open(const void* bytes, uint64_t size, const void* data, uint64_t data_size, void** opened) {
  message.clear();
  auto program = std::make_unique<Program>();
  program->bytes = copy_of(bytes, size);
  if (data != nullptr) program->data = copy_of(data, data_size);
  if (!program->bytes || (data != nullptr && !program->data)) return failed(Error::MemoryAllocationFailed);
  std::unique_ptr<DataLoader> weights;
  if (program->data) weights = std::make_unique<BufferDataLoader>(program->data.get(), data_size);
  program->module = std::make_unique<Module>(
      std::make_unique<BufferDataLoader>(program->bytes.get(), size),
      nullptr,
      nullptr,
      nullptr,
      std::move(weights));
  const Error error = program->module->load(
      executorch::runtime::Program::Verification::InternalConsistency);
  if (error != Error::Ok) return failed(error);
  *opened = program.release();
  return 0;
}

void spafl_close(void* program) { delete static_cast<Program*>(program); }

// Tells the backend at `index` that the method needs; 0 and an empty name past the last one.
int spafl_backend(void* opened, const char* method, int index, const char** name) {
  message.clear();
  *name = "";
  auto meta = static_cast<Program*>(opened)->module->method_meta(method);
  if (!meta.ok()) return failed(meta.error());
  if (static_cast<size_t>(index) >= meta->num_backends()) return 0;
  auto backend = meta->get_backend_name(index);
  if (!backend.ok()) return failed(backend.error());
  *name = *backend;
  return 0;
}

// Makes a method ready to run. A backend that is missing or unavailable is an error here: to run without it crashes.
int spafl_load(void* opened, const char* method) {
  message.clear();
  auto* program = static_cast<Program*>(opened);
  if (program->module->is_method_loaded(method)) return 0;
  auto meta = program->module->method_meta(method);
  if (!meta.ok()) return failed(meta.error());
  for (size_t i = 0; i < meta->num_backends(); ++i) {
    auto name = meta->get_backend_name(i);
    if (!name.ok()) return failed(name.error());
    const auto* backend = executorch::runtime::get_backend_class(*name);
    if (backend == nullptr || !backend->is_available()) {
      return failed(Error::NotFound, std::string("backend ") + *name + " is not available on this machine");
    }
  }
  Planned& planned = program->planned[method];
  planned = Planned();
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    auto size = meta->memory_planned_buffer_size(i);
    if (!size.ok()) return failed(size.error());
    const size_t bytes = static_cast<size_t>(*size) + kAlignment;
    planned.blocks.emplace_back(static_cast<uint8_t*>(std::calloc(bytes, 1)));
    if (!planned.blocks.back()) return failed(Error::MemoryAllocationFailed);
    void* start = planned.blocks.back().get();
    size_t room = bytes;
    start = std::align(kAlignment, static_cast<size_t>(*size), start, room);
    planned.spans.emplace_back(static_cast<uint8_t*>(start), static_cast<size_t>(*size));
  }
  planned.allocator = std::make_unique<HierarchicalAllocator>(
      Span<Span<uint8_t>>(planned.spans.data(), planned.spans.size()));
  const Error error = program->module->load_method(method, planned.allocator.get());
  return error == Error::Ok ? 0 : failed(error);
}

// Tells how many inputs and outputs a method has.
int spafl_count(void* opened, const char* method, int32_t* inputs, int32_t* outputs) {
  message.clear();
  auto meta = static_cast<Program*>(opened)->module->method_meta(method);
  if (!meta.ok()) return failed(meta.error());
  *inputs = static_cast<int32_t>(meta->num_inputs());
  *outputs = static_cast<int32_t>(meta->num_outputs());
  return 0;
}

// Tells dtype, bytes and sizes of an input or output, the largest ones where they vary. `data` becomes non-null if the
// program has memory of its own for it.
int spafl_describe(void* opened, const char* method, int is_output, int index, SpaflArray* array) {
  message.clear();
  auto meta = static_cast<Program*>(opened)->module->method_meta(method);
  if (!meta.ok()) return failed(meta.error());
  auto tensor = is_output ? meta->output_tensor_meta(index) : meta->input_tensor_meta(index);
  if (!tensor.ok()) return failed(tensor.error(), "an input or output is not a tensor");
  if (tensor->sizes().size() > kMaxRank) return failed(Error::NotSupported, "a tensor of more than 8 axes");
  array->data = tensor->is_memory_planned() ? array : nullptr;
  array->bytes = tensor->nbytes();
  array->dtype = static_cast<int32_t>(tensor->scalar_type());
  array->rank = static_cast<int32_t>(tensor->sizes().size());
  for (int axis = 0; axis < array->rank; ++axis) array->sizes[axis] = tensor->sizes()[axis];
  return 0;
}

// Runs a loaded method. An output whose `data` is given, with room for the largest one, is written there; of others
// `data` points into the program's own memory, good until the next call. The sizes told are the actual ones.
int spafl_run(
    void* opened, const char* method, int32_t inputs, const SpaflArray* in, int32_t outputs, SpaflArray* out) {
  message.clear();
  auto* program = static_cast<Program*>(opened);
  Module& module = *program->module;
  std::vector<TensorPtr> alive;
  std::vector<EValue> values;
  alive.reserve(inputs + outputs);
  values.reserve(inputs);
  for (int i = 0; i < inputs; ++i) {
    std::vector<executorch::aten::SizesType> sizes(in[i].sizes, in[i].sizes + in[i].rank);
    alive.push_back(from_blob(in[i].data, std::move(sizes), static_cast<ScalarType>(in[i].dtype)));
    values.emplace_back(alive.back());
  }
  for (int i = 0; i < outputs; ++i) {
    if (out[i].data == nullptr) continue;
    std::vector<executorch::aten::SizesType> sizes(out[i].sizes, out[i].sizes + out[i].rank);
    alive.push_back(from_blob(out[i].data, std::move(sizes), static_cast<ScalarType>(out[i].dtype)));
    const Error error = module.set_output(method, EValue(alive.back()), i);
    if (error != Error::Ok) return failed(error);
  }
  auto results = module.execute(method, values);
  if (!results.ok()) return failed(results.error());
  program->outputs = std::move(*results);
  if (program->outputs.size() != static_cast<size_t>(outputs)) {
    return failed(Error::InvalidArgument, "another number of outputs than asked for");
  }
  for (int i = 0; i < outputs; ++i) {
    if (!program->outputs[i].isTensor()) return failed(Error::InvalidType, "an output is not a tensor");
    auto tensor = program->outputs[i].toTensor();
    if (tensor.dim() > kMaxRank) return failed(Error::NotSupported, "a tensor of more than 8 axes");
    out[i].dtype = static_cast<int32_t>(tensor.scalar_type());
    out[i].rank = static_cast<int32_t>(tensor.dim());
    for (int axis = 0; axis < out[i].rank; ++axis) out[i].sizes[axis] = tensor.size(axis);
    out[i].bytes = tensor.nbytes();
    if (out[i].data == nullptr) {
      out[i].data = tensor.mutable_data_ptr();
    } else if (out[i].data != tensor.const_data_ptr()) {  // an output that is an input, handed through
      std::memcpy(out[i].data, tensor.const_data_ptr(), out[i].bytes);
    }
  }
  return 0;
}

}  // extern "C"
