//! Which questions a worker gets about the memory of operations: one for each shape and type of what they read.

use llama_cpp_sys_2 as sys;

use super::wire::Wire;
use super::{WORKERS, Worker, on_workers};

/// CUDA's flash attention puts K and V behind its result, converted. So another type or length of the cache takes more
/// with the same result, and who is not asked again is given too little. A processor takes nothing more, but that it is
/// asked can be seen on the wire.
#[test]
fn a_worker_is_asked_for_what_is_read() {
    let Ok(worker) = std::env::var(WORKERS) else {
        let test = "rpc::sizes::a_worker_is_asked_for_what_is_read";
        on_workers(&[Worker::start()], &[test]);
        return;
    };
    let wire = Wire::to(&worker);
    let devices = hae::llama::add_workers(std::slice::from_ref(&wire.address)).unwrap();
    let there = devices.iter().find(|device| device.is_remote).unwrap();
    let name = std::ffi::CString::new(there.name.as_str()).unwrap();
    // SAFETY: the device of that name was just registered, and stays. The context holds more tensors than are made,
    // without data, and is freed behind the last use of them.
    unsafe {
        let device = sys::ggml_backend_dev_by_name(name.as_ptr());
        assert!(!device.is_null());
        let kind_of_buffer = sys::ggml_backend_dev_buffer_type(device);
        let context = sys::ggml_init(sys::ggml_init_params {
            mem_size: 64 * sys::ggml_tensor_overhead(),
            mem_buffer: std::ptr::null_mut(),
            no_alloc: true,
        });
        let tensor = |kind, n| sys::ggml_new_tensor_4d(context, kind, 64, n, 4, 1);
        let attention = |kind, n_kv| {
            let (k, v) = (tensor(kind, n_kv), tensor(kind, n_kv));
            let q = tensor(sys::GGML_TYPE_F32, 8);
            let none = std::ptr::null_mut();
            sys::ggml_flash_attn_ext(context, q, k, v, none, 0.125, 0.0, 0.0)
        };
        let is_node_asked = |node| {
            wire.take();
            let size = sys::ggml_backend_buft_get_alloc_size(kind_of_buffer, node);
            assert!(size >= 64 * 8 * 4 * 4, "{size}");
            wire.take()[0] > 0
        };
        let is_asked = |kind, n_kv| is_node_asked(attention(kind, n_kv));
        assert!(is_asked(sys::GGML_TYPE_F16, 256));
        assert!(!is_asked(sys::GGML_TYPE_F16, 256), "it is known");
        assert!(is_asked(sys::GGML_TYPE_Q8_0, 256), "another type");
        assert!(is_asked(sys::GGML_TYPE_F16, 512), "a longer cache");
        assert!(!is_asked(sys::GGML_TYPE_Q8_0, 256));
        let with_sinks = attention(sys::GGML_TYPE_F16, 256);
        let sinks = sys::ggml_new_tensor_1d(context, sys::GGML_TYPE_F32, 4);
        sys::ggml_flash_attn_ext_add_sinks(with_sinks, sinks);
        assert!(is_node_asked(with_sinks), "sinks behind no mask");
        sys::ggml_free(context);
    }
}
