"""A stand-in for cuda.bindings.driver, which shows the calls and lets them fail."""

from types import SimpleNamespace

from numba_attn.cuda.host import driver


class Names:
    """An enum whose members are their own names."""

    def __getattr__(self, name):
        return name


OWN = 0xA0  # the handle of the device's own stream


class FakeBindings:
    """Records the calls; `fails` has the error that a function gives. Contexts are a stack, as in the driver."""

    CONTEXT, OTHER = 0xC0, 0xB0

    def __init__(self, pools=True, **fails):
        self.calls, self.fails, self.stack, self.freed = [], fails, [], []
        self.address, self.pools, self.devices, self.capturing = 1 << 20, pools, 2, "CU_STREAM_CAPTURE_STATUS_NONE"
        self.CUdevice_attribute = self.CUfunction_attribute = self.CUpointer_attribute = Names()
        self.CUmemPool_attribute = self.CUmemAllocationType = self.CUmemAllocationHandleType = Names()
        self.CUmemLocationType = self.CUstreamCaptureStatus = self.CUstreamCaptureMode = self.CUjit_option = Names()
        self.CUevent_flags = SimpleNamespace(CU_EVENT_DEFAULT=0, CU_EVENT_DISABLE_TIMING=2)
        self.CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
        self.cuuint64_t = int
        self.done = True  # of every event
        self.mode = self.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL

    def CUmemPoolProps(self):
        return SimpleNamespace(location=SimpleNamespace())

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)
        do = getattr(type(self), f"_{name}", lambda self, *arguments: (0,))

        def call(*arguments):
            self.calls.append((name, *arguments))
            if name in self.fails:
                return self.fails[name], None
            return do(self, *arguments)

        return call

    def names(self):
        """The calls made since the last time, without those that only ask which context is current."""
        asking = ("cuCtxGetCurrent", "cuEventQuery", "cuThreadExchangeStreamCaptureMode")
        names = [call[0] for call in self.calls if call[0] not in asking]
        self.calls.clear()
        return names

    def one(self, name):
        """The arguments of the only call of this name."""
        (found,) = [call[1:] for call in self.calls if call[0] == name]
        return found

    def _cuGetErrorName(self, error):
        return 0, {1: b"CUDA_ERROR_INVALID_VALUE", 2: b"CUDA_ERROR_OUT_OF_MEMORY"}.get(error, b"CUDA_ERROR_OTHER")

    def _cuGetErrorString(self, error):
        return 0, b"the words of the driver"

    def _cuDeviceGetCount(self):
        return 0, self.devices

    def _cuDeviceGet(self, index):
        return 0, index

    def _cuDeviceGetName(self, size, device):
        return 0, b"Fake\0\0\0"

    def _cuDeviceGetAttribute(self, name, device):
        name = name.removeprefix("CU_DEVICE_ATTRIBUTE_")
        return 0, {
            "COMPUTE_CAPABILITY_MAJOR": 9,
            "COMPUTE_CAPABILITY_MINOR": 0,
            "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232448,
            "MULTIPROCESSOR_COUNT": 132,
            "MEMORY_POOLS_SUPPORTED": int(self.pools),
        }[name]

    def _cuDeviceTotalMem(self, device):
        return 0, 80 << 30

    def _cuDevicePrimaryCtxRetain(self, device):
        return 0, self.CONTEXT + device

    def _cuThreadExchangeStreamCaptureMode(self, mode):
        before, self.mode = self.mode, mode
        return 0, before

    def _cuCtxGetCurrent(self):
        return 0, self.stack[-1] if self.stack else 0

    def _cuCtxGetDevice(self):
        assert self.stack, "an error of the driver, which compute-sanitizer reports"
        return 0, self.stack[-1] - self.CONTEXT

    def _cuCtxPushCurrent(self, context):
        self.stack.append(context)
        return (0,)

    def _cuCtxPopCurrent(self):
        return 0, self.stack.pop()

    def _cuMemPoolCreate(self, props):
        return 0, "pool"

    def _cuMemAllocFromPoolAsync(self, size, pool, stream):
        self.address += 1 << 20
        return 0, self.address

    def _cuMemAlloc(self, size):
        return self._cuMemAllocFromPoolAsync(size, None, None)

    def _cuStreamIsCapturing(self, stream):
        return 0, self.capturing

    def _cuStreamCreate(self, flags):
        assert flags == 1, "a stream that waits for the legacy default one, and that one for it"
        return 0, OWN

    def _cuEventCreate(self, flags):
        return 0, f"event {len(self.calls)}"

    def _cuEventElapsedTime(self, first, last):
        return 0, 1500.0

    def _cuEventQuery(self, event):
        return (0,) if self.done else (600,)

    def _cuModuleLoadData(self, image):
        return 0, "module"

    _cuModuleLoadDataEx = lambda self, image, n, options, values: (0, "module")  # noqa: E731

    def _cuModuleGetFunction(self, module, name):
        return 0, "function"

    def _cuFuncGetAttribute(self, attribute, function):
        return 0, 1024

    def _cuPointerGetAttribute(self, attribute, address):
        return 0, 1


def fake_device(index=0, **options):
    cu = FakeBindings(**options)
    device = driver.Device(index, cu)
    cu.made, cu.calls = cu.calls, []
    return device, cu
