// A CUDA device whose memory is the host's and whose kernels are the CPU's, for tests without a GPU.
//
// Tensors are of device cuda in every respect that Python sees. Each operation runs on CPU tensors that
// share their memory. What a GPU or NCCL would refuse is an error here, new memory is NaN, and whatever
// would make the host wait for the device is counted by name. Streams and events do nothing: work is
// done when a call returns. So nothing here says that a kernel is right or how long it takes.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::DispatchKey, c10::IValue, c10::Stream;

std::atomic<DeviceIndex> current{0}, device_count{1};
std::atomic<int64_t> allocated{0}, peak{0};

// ---- what makes the host wait -----------------------------------------------------------------------

std::mutex waits_mutex;
std::map<std::string, int64_t> waits;

void count_wait(const std::string& what) {
  std::lock_guard<std::mutex> lock(waits_mutex);
  ++waits[what];
}

// Operations that return a number, or a tensor whose size depends on what is on the device.
const std::set<std::string> kWaits{
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::equal", "aten::bincount", "aten::repeat_interleave.Tensor"};

const std::set<std::string> kMatrixProducts{"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"};

// ---- device and memory ------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Stream stream_of(Device d) {
    return Stream(Stream::UNSAFE, Device(DeviceType::CUDA, d.has_index() ? d.index() : current.load()), 0);
  }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override {
    return Device(DeviceType::CUDA, d.has_index() ? current.exchange(d.index()) : current.load());
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device d) const override { exchangeDevice(d); }
  void uncheckedSetDevice(Device d) const noexcept override { exchangeDevice(d); }
  Stream getStream(Device d) const override { return stream_of(d); }
  Stream getDefaultStream(Device d) const override { return stream_of(d); }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return stream_of(d); }
  Stream getNewStream(Device d, int) const override { return stream_of(d); }
  Stream exchangeStream(Stream s) const override { return stream_of(s.device()); }
  DeviceIndex deviceCount() const noexcept override { return device_count; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { count_wait("synchronize"); }
  void synchronizeEvent(void*) const override { count_wait("synchronize"); }
  void synchronizeDevice(const DeviceIndex) const override { count_wait("synchronize"); }
};

void account(int64_t bytes) {
  int64_t now = allocated += bytes, before = peak;
  while (now > before && !peak.compare_exchange_weak(before, now)) {}
}

struct Block {
  void* data;
  size_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  std::free(block->data);
  account(-static_cast<int64_t>(block->bytes));
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const Device device(DeviceType::CUDA, current);
    if (bytes == 0) return {nullptr, device};
    auto* block = new Block{nullptr, bytes};
    TORCH_CHECK(posix_memalign(&block->data, 512, bytes) == 0, "CUDA out of memory");
    std::memset(block->data, 0xFF, bytes);  // NaN in every floating-point type
    account(bytes);
    return {block->data, block, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;

// A storage on one device over the memory of a storage on the other, which it keeps alive.
struct Lease {
  c10::Storage owner;
  int64_t bytes;  // counted as device memory: what a CPU kernel has made
};

void end_lease(void* context) {
  auto* lease = static_cast<Lease*>(context);
  account(-lease->bytes);
  delete lease;
}

c10::Storage share(const c10::Storage& owner, Device device) {
  auto* impl = owner.unsafeGetStorageImpl();
  const bool to_device = device.is_cuda();
  auto* lease = new Lease{owner, to_device ? static_cast<int64_t>(impl->nbytes()) : 0};
  account(lease->bytes);
  c10::Allocator* allocator = to_device ? &memory : c10::GetCPUAllocator();
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), impl->nbytes(),
      c10::DataPtr(impl->mutable_data(), lease, &end_lease, device), allocator, /*resizable=*/true));
}

at::Tensor tensor_like(const at::Tensor& tensor, c10::Storage storage, DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return made;
}

// ---- random numbers: the CPU's generator under another device ---------------------------------------

struct Generator final : c10::GeneratorImpl {
  at::Generator cpu = at::detail::createCPUGenerator();
  explicit Generator(DeviceIndex index)
      : GeneratorImpl(Device(DeviceType::CUDA, index), c10::DispatchKeySet(DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override {
    auto* copy = new Generator(device().index());
    copy->cpu = cpu.clone();
    return copy;
  }
};

at::Generator new_generator(DeviceIndex index) {
  return at::Generator(c10::make_intrusive<Generator>(index < 0 ? current.load() : index));
}

const at::Generator& default_generator() {
  static const at::Generator generator = new_generator(0);
  return generator;
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return device_count; }
  DeviceIndex deviceCount() const override { return device_count; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex d) const override { current = d; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { return current.exchange(d); }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return current.exchange(d); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(DeviceIndex index) const override { return new_generator(index); }
  Device getDeviceFromPtr(void*) const override { return Device(DeviceType::CUDA, current); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  void deviceSynchronize(DeviceIndex) const override { count_wait("synchronize"); }
};

// ---- operations -------------------------------------------------------------------------------------

// The CPU's view of an operation's arguments, and the way back for what it returns.
class Views {
 public:
  at::Tensor on_cpu(const at::Tensor& tensor) {
    for (auto& [device, cpu] : tensors_)
      if (device.is_same(tensor)) return cpu;
    const auto storage = on_cpu(tensor.storage());
    tensors_.emplace_back(tensor, tensor_like(tensor, storage, DispatchKey::CPU));
    return tensors_.back().second;
  }

  c10::Storage on_cpu(const c10::Storage& storage) {
    auto [found, is_new] = to_cpu_.try_emplace(storage.unsafeGetStorageImpl());
    if (is_new) {
      found->second = share(storage, Device(DeviceType::CPU));
      to_device_.emplace(found->second.unsafeGetStorageImpl(), storage);
    }
    return found->second;
  }

  at::Tensor on_device(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu()) return tensor;
    for (auto& [device, cpu] : tensors_)
      if (cpu.is_same(tensor)) return device;
    return tensor_like(tensor, on_device(tensor.storage()), DispatchKey::CUDA);
  }

  // In-place operations may have given an argument another shape, size or storage (resize_, set_).
  void carry_back() {
    for (auto& [device, cpu] : tensors_) {
      auto* impl = device.unsafeGetTensorImpl();
      auto& known = to_device_.at(cpu.storage().unsafeGetStorageImpl());
      if (known.data() != cpu.storage().data()) known = share(cpu.storage(), known.device());  // grown
      if (!known.is_alias_of(device.storage())) impl->set_storage_keep_dtype(known);
      if (device.sizes() != cpu.sizes() || device.strides() != cpu.strides() ||
          device.storage_offset() != cpu.storage_offset())
        impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }

  IValue on_cpu(const IValue& value) {
    if (value.isTensor()) {
      const auto& tensor = value.toTensor();
      return tensor.defined() && tensor.is_cuda() ? IValue(on_cpu(tensor)) : value;
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(on_cpu(IValue(tensor)).toTensor());
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
        list.push_back(tensor ? std::optional(on_cpu(IValue(*tensor)).toTensor()) : tensor);
      return list;
    }
    if (value.isList() && value.toList().elementType()->kind() == c10::TypeKind::ListType) {
      c10::List<c10::List<at::Tensor>> lists;
      for (const IValue& item : value.toListRef()) lists.push_back(on_cpu(item).to<c10::List<at::Tensor>>());
      return lists;
    }
    if (value.isStorage() && value.toStorage().device().is_cuda()) return on_cpu(value.toStorage());
    if (value.isDevice() && value.toDevice().is_cuda()) return Device(DeviceType::CPU);
    if (value.isGenerator() && value.toGenerator().device().is_cuda())
      return static_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl())->cpu;
    return value;
  }

  IValue on_device(const IValue& value) {
    if (value.isTensor()) return on_device(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(on_device(tensor));
    return list;
  }

 private:
  c10::Storage on_device(const c10::Storage& storage) {
    auto [found, is_new] = to_device_.try_emplace(storage.unsafeGetStorageImpl());
    if (is_new) found->second = share(storage, Device(DeviceType::CUDA, current));
    return found->second;
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> to_cpu_, to_device_;
};

void gather_tensors(const IValue& value, std::vector<at::Tensor>& found) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) found.push_back(value.toTensor());
  } else if (value.isList()) {
    for (const IValue& item : value.toListRef()) gather_tensors(item, found);
  }
}

std::vector<at::Tensor> tensors_of(const std::vector<IValue>& arguments) {
  std::vector<at::Tensor> found;
  for (const IValue& argument : arguments) gather_tensors(argument, found);
  return found;
}

// Copies and indices may come from the other side; numbers (CPU tensors without a dimension) always may.
bool may_mix(const std::string& name) {
  return name == "aten::copy_" || name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index_put", 0) == 0;
}

// Raises where tensors lie on different devices. Returns: the one of the CUDA tensors.
Device common_device(const std::string& name, const std::vector<at::Tensor>& tensors) {
  std::optional<Device> found;
  for (const at::Tensor& tensor : tensors) {
    const bool is_number = tensor.is_cpu() && tensor.dim() == 0;
    TORCH_CHECK(tensor.is_cuda() || is_number || may_mix(name), "Expected all tensors to be on the same device: ",
                name, " got one on ", tensor.device());
    if (!tensor.is_cuda()) continue;
    TORCH_CHECK(!found || *found == tensor.device(), "Expected all tensors to be on the same device: ", name,
                " got one on ", *found, " and one on ", tensor.device());
    found = tensor.device();
  }
  return found.value_or(Device(DeviceType::CUDA, current));
}

void note_waits(const std::string& name, const std::vector<IValue>& arguments) {
  if (name == "aten::copy_") {
    const bool up = arguments[0].toTensor().is_cuda(), down = arguments[1].toTensor().is_cuda();
    if (up != down && !arguments[2].toBool()) count_wait(up ? "copy to the device" : "copy to the host");
    return;
  }
  if (kWaits.count(name)) count_wait(name);
  // What is put under a mask is counted on the host first, unless it is one number: masked_fill.
  if (name != "aten::_index_put_impl_" || arguments[2].toTensor().numel() == 1) return;
  for (const at::Tensor& tensor : tensors_of({arguments[1]}))
    if (tensor.is_cuda() && tensor.scalar_type() == at::kBool) count_wait("aten::nonzero");
}

const auto kOptionalGenerator = c10::OptionalType::create(c10::GeneratorType::get());

void on_cpu_kernels(const c10::OperatorHandle& op, torch::jit::Stack* stack, const std::vector<IValue>& arguments) {
  Views views;
  const auto& parameters = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const bool draws = arguments[i].isNone() && parameters[i].type()->isSubtypeOf(*kOptionalGenerator);
    (*stack)[stack->size() - arguments.size() + i] =
        views.on_cpu(draws ? IValue(default_generator()) : arguments[i]);
  }
  {
    at::AutoDispatchBelowAutograd below;
    op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
  }
  views.carry_back();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i)
    (*stack)[i] = views.on_device((*stack)[i]);
}

std::vector<IValue> arguments_of(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  return {stack.end() - op.schema().arguments().size(), stack.end()};
}

void operation(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const auto arguments = arguments_of(op, *stack);
  const auto tensors = tensors_of(arguments);
  const c10::DeviceGuard guard(common_device(name, tensors));
  note_waits(name, arguments);
  // cuBLAS has no integers.
  if (kMatrixProducts.count(schema.name()))
    TORCH_CHECK(!at::isIntegralType(tensors[0].scalar_type(), true), name, " of integers is not implemented on CUDA");
  on_cpu_kernels(op, stack, arguments);
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, c10::DispatchKeySet(DispatchKey::CUDA),
                                   dtype.value_or(c10::get_default_dtype_as_scalartype()), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           c10::DispatchKeySet(DispatchKey::CUDA),
                                           dtype.value_or(c10::get_default_dtype_as_scalartype()));
}

void record_stream(at::Tensor&, Stream) {}

// ---- collectives: NCCL's conditions, gloo's messages ------------------------------------------------

const std::set<at::ScalarType> kNcclTypes{at::kByte, at::kChar, at::kInt, at::kLong, at::kHalf,
                                          at::kBFloat16, at::kFloat, at::kDouble, at::kBool};

void collective(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const auto arguments = arguments_of(op, *stack);
  for (const at::Tensor& tensor : tensors_of(arguments)) {
    TORCH_CHECK(tensor.is_cuda(), name, ": NCCL needs CUDA tensors, this one is on ", tensor.device());
    TORCH_CHECK(tensor.device().index() == current, name, ": a tensor on ", tensor.device(),
                " while the current device is cuda:", int(current));
    TORCH_CHECK(tensor.is_contiguous(), name, ": NCCL needs contiguous tensors");
    TORCH_CHECK(kNcclTypes.count(tensor.scalar_type()), name, ": NCCL has no ", tensor.scalar_type());
  }
  on_cpu_kernels(op, stack, arguments);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&operation>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("record_stream", &record_stream);
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&operation>());
}

TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const char* name :
       {"send", "recv_", "recv_any_source_", "broadcast_", "reduce_", "allreduce_", "allreduce_coalesced_",
        "allgather_", "_allgather_base_", "allgather_into_tensor_coalesced_", "reduce_scatter_",
        "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "gather_", "scatter_", "alltoall_",
        "alltoall_base_", "barrier"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&collective>());
}

void resize_storage(const at::Tensor& tensor, int64_t bytes) {
  auto* impl = tensor.storage().unsafeGetStorageImpl();
  auto data = memory.allocate(bytes);
  if (bytes > 0 && impl->nbytes() > 0)
    std::memcpy(data.get(), impl->data(), std::min<size_t>(bytes, impl->nbytes()));
  impl->set_data_ptr_noswap(std::move(data));
  impl->set_nbytes(bytes);
}

std::map<std::string, int64_t> take_waits() {
  std::lock_guard<std::mutex> lock(waits_mutex);
  return std::exchange(waits, {});
}

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
}

PYBIND11_MODULE(_cuda_stand_in, m) {
  c10::SetAllocator(DeviceType::CUDA, &memory, 1);
  m.def("current_device", [] { return int(current); });
  m.def("set_device", [](int index) {
    TORCH_CHECK(0 <= index && index < device_count, "invalid device ordinal");
    current = index;
  });
  m.def("set_device_count", [](int count) { device_count = count; });
  m.def("memory_allocated", [] { return allocated.load(); });
  m.def("max_memory_allocated", [] { return peak.load(); });
  m.def("reset_peak_memory_stats", [] { peak = allocated.load(); });
  m.def("count_wait", &count_wait);
  m.def("take_waits", &take_waits, "Waits since the last call, by what made the host wait.");
  m.def("resize_storage", &resize_storage);
  m.def("default_generator", &default_generator);
}
