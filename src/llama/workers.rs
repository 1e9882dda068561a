//! Other machines: workers that speak ggml's RPC, as its client and as one of them.
//!
//! ggml ends the process where a worker is none, is of another version or does not answer. So each is
//! greeted here first, by the same protocol (`ggml-rpc.cpp`), and only then handed to ggml.

use std::ffi::{CStr, CString, c_char, c_void};
use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use llama_cpp_sys_2 as sys;

use super::devices::{self, Device};
use super::{backend, log};
use crate::error::{Error, Result};

/// `RPC_PROTO_MAJOR_VERSION` and the two behind it, which the bindings lack.
const VERSION: [u8; 3] = [7, 0, 0];
/// `RPC_CMD_HELLO`, `RPC_CMD_DEVICE_COUNT` and `RPC_CONN_CAPS_SIZE`.
const HELLO: u8 = 14;
const DEVICE_COUNT: u8 = 15;
const CAPS: usize = 24;
/// A worker that does nothing else answers at once. One that serves another client accepts, and then says nothing.
const PATIENCE: Duration = Duration::from_secs(5);

type AddServer = unsafe extern "C" fn(*const c_char) -> sys::ggml_backend_reg_t;
type StartServer =
    unsafe extern "C" fn(*const c_char, *const c_char, usize, usize, *mut sys::ggml_backend_dev_t);

/// Workers that ggml knows.
static KNOWN: Mutex<Vec<Worker>> = Mutex::new(Vec::new());

struct Worker {
    endpoint: String,
    /// Kept for good: it holds the connection, so that no other client comes between two uses of it.
    _backend: sys::ggml_backend_t,
}

// SAFETY: nobody uses the backend, from any thread.
unsafe impl Send for Worker {}

/// A function of ggml's RPC backend; `None` where it is not compiled in.
///
/// # Safety
/// The name is that of a function of type `F`.
unsafe fn function<F: Copy>(name: &CStr) -> Result<Option<F>> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    backend()?;
    // SAFETY: both names are C strings; the registry lives as long as the process, and what it gives for
    // a name is null or a function of the type that the caller says.
    unsafe {
        let registered = sys::ggml_backend_reg_by_name(c"RPC".as_ptr());
        if registered.is_null() {
            return Ok(None);
        }
        let found = sys::ggml_backend_reg_get_proc_address(registered, name.as_ptr());
        Ok((!found.is_null()).then(|| std::mem::transmute_copy(&found)))
    }
}

const WITHOUT: &str =
    "this program was built without ggml's RPC backend: build it with the feature rpc";

/// Makes the devices of workers known, each `HOST:PORT`, and gives all that there are now. Their names are `RPC0` and
/// so on, in the order of the workers. All workers are greeted before ggml is told of the first.
///
/// # Errors
/// [`Error::Option`] naming `rpc`: what is no address, a worker that does not answer or speaks another version, and a
/// program without this backend.
pub fn add_workers(endpoints: &[String]) -> Result<Vec<Device>> {
    // SAFETY: the type is that of ggml-rpc.h.
    let Some(add) = (unsafe { function::<AddServer>(c"ggml_backend_rpc_add_server") })? else {
        return Err(Error::option("rpc", WITHOUT));
    };
    let mut known = KNOWN.lock().unwrap_or_else(|e| e.into_inner());
    let mut names = Vec::new();
    for (i, endpoint) in endpoints.iter().enumerate() {
        let twice = known.iter().any(|worker| worker.endpoint == *endpoint);
        if twice || endpoints[..i].contains(endpoint) {
            return Err(refused(endpoint, "is given twice"));
        }
        let name = CString::new(endpoint.as_str());
        names.push(name.map_err(|_| refused(endpoint, ADDRESS))?);
        greet(endpoint)?;
    }
    for (endpoint, name) in endpoints.iter().zip(&names) {
        // SAFETY: the name is a C string. ggml copies it, and never frees what it gives.
        let backend = unsafe {
            let worker = add(name.as_ptr());
            if worker.is_null() {
                return Err(refused(endpoint, "has no devices"));
            }
            sys::ggml_backend_register(worker);
            sys::ggml_backend_dev_init(sys::ggml_backend_reg_dev_get(worker, 0), std::ptr::null())
        };
        known.push(Worker {
            endpoint: endpoint.clone(),
            _backend: backend,
        });
    }
    drop(known);
    devices::devices()
}

const ADDRESS: &str = "expected HOST:PORT, as in 192.168.1.2:50052";

fn refused(endpoint: &str, reason: &str) -> Error {
    Error::option("rpc", format!("{endpoint:?}: {reason}"))
}

/// Whether a worker answers that speaks our version and has devices.
fn greet(endpoint: &str) -> Result<()> {
    let (host, port) = endpoint.split_once(':').unwrap_or_default();
    let port = port.parse().ok().filter(|&port: &u16| port > 0);
    let Some(port) = port.filter(|_| !host.is_empty()) else {
        return Err(refused(endpoint, ADDRESS));
    };
    let found = (host, port).to_socket_addrs();
    let found = found.map_err(|e| refused(endpoint, &format!("has no such host ({e})")))?;
    // ggml takes no others.
    let Some(address) = found.into_iter().find(SocketAddr::is_ipv4) else {
        return Err(refused(endpoint, "has no IPv4 address"));
    };
    let worker = TcpStream::connect_timeout(&address, PATIENCE)
        .map_err(|e| refused(endpoint, &format!("no worker answers there ({e})")))?;
    let version = hello(&worker).map_err(|e| {
        let reason = match e.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => format!(
                "accepts, but says nothing for {} s: it serves another client, or is no worker",
                PATIENCE.as_secs()
            ),
            _ => "is no worker, or one of another version of ggml".to_owned(),
        };
        refused(endpoint, &reason)
    })?;
    // ggml itself looks at the first two. The third counts changes of its operations' numbers, which the graphs
    // that are sent are made of.
    if version[0] != VERSION[0] || version[1] > VERSION[1] || version[2] != VERSION[2] {
        let [theirs, ours] = [version, VERSION].map(|[a, b, c]| format!("{a}.{b}.{c}"));
        let reason = format!("speaks version {theirs} of ggml's RPC, expected {ours}");
        return Err(refused(endpoint, &reason));
    }
    match device_count(&worker) {
        Ok(0) => Err(refused(endpoint, "has no devices")),
        Ok(_) => Ok(()),
        Err(e) => Err(refused(
            endpoint,
            &format!("does not say its devices ({e})"),
        )),
    }
}

/// The version of who listens, by the first message of each connection.
fn hello(mut worker: &TcpStream) -> std::io::Result<[u8; 3]> {
    worker.set_read_timeout(Some(PATIENCE))?;
    worker.set_write_timeout(Some(PATIENCE))?;
    let mut request = vec![HELLO];
    request.extend((CAPS as u64).to_le_bytes());
    request.extend([0; CAPS]);
    worker.write_all(&request)?;
    let answer: [u8; 4 + CAPS] = answer(worker)?;
    Ok([answer[0], answer[1], answer[2]])
}

fn device_count(mut worker: &TcpStream) -> std::io::Result<u32> {
    let mut request = vec![DEVICE_COUNT];
    request.extend(0u64.to_le_bytes());
    worker.write_all(&request)?;
    Ok(u32::from_le_bytes(answer(worker)?))
}

/// An answer of exactly so many bytes, behind their number.
fn answer<const N: usize>(mut worker: &TcpStream) -> std::io::Result<[u8; N]> {
    let mut size = [0; 8];
    worker.read_exact(&mut size)?;
    if u64::from_le_bytes(size) != N as u64 {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    let mut bytes = [0; N];
    worker.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// What to say where ggml's client has lost a worker (the patch `rpc-workers`).
pub(super) fn lost(assertion: &str) -> Option<String> {
    let (_, rest) = assertion.split_once("Remote RPC server ")?;
    let (endpoint, _) = rest.split_once(" crashed or")?;
    Some(format!(
        "the worker at {endpoint} is gone, and its layers and their cache with it: see that it runs, then begin again"
    ))
}

/// How to be a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerOptions {
    /// Where to listen.
    pub address: SocketAddrV4,
    /// Threads of a processor that computes.
    pub n_threads: usize,
    /// Names of the devices to offer; empty: every accelerator, or where there is none the processor.
    pub devices: Vec<String>,
    /// Folder that keeps large tensors, so that a model is sent once.
    pub cache: Option<PathBuf>,
}

/// Serves this machine's devices to one client after the other, until the process ends. ggml prints what it does.
///
/// # Errors
/// [`Error::Option`] for a device that is not there or an address that is taken or not ours, and of a program without
/// this backend; [`Error::Io`] for a cache that cannot be made.
pub fn serve_worker(options: &WorkerOptions) -> Result<()> {
    // SAFETY: the type is that of ggml-rpc.h.
    let Some(start) = (unsafe { function::<StartServer>(c"ggml_backend_rpc_start_server") })?
    else {
        return Err(Error::llama("ggml_backend_rpc_start_server", WITHOUT));
    };
    let mut devices = offered(&options.devices)?;
    let cache = match &options.cache {
        Some(folder) => {
            std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
            let text = folder.to_str().and_then(|text| CString::new(text).ok());
            let reason = "its path is not UTF-8, which ggml needs";
            Some(text.ok_or_else(|| Error::file(folder, reason))?)
        }
        None => None,
    };
    // ggml only says that it failed.
    drop(
        TcpListener::bind(options.address)
            .map_err(|e| Error::option("port", format!("{}: {e}", options.address)))?,
    );
    let endpoint = CString::new(options.address.to_string());
    let endpoint = endpoint.map_err(|_| Error::contract("an address with a zero"))?;
    log::forget();
    // SAFETY: both texts are C strings that live during the call, as does the list of devices of the registry, with
    // its length.
    unsafe {
        start(
            endpoint.as_ptr(),
            cache.as_ref().map_or(std::ptr::null(), |c| c.as_ptr()),
            options.n_threads,
            devices.len(),
            devices.as_mut_ptr(),
        );
    }
    let reason = log::take_reason("it stopped listening");
    Err(Error::llama("ggml_backend_rpc_start_server", reason))
}

/// Devices by name, or those that a worker offers by itself.
fn offered(names: &[String]) -> Result<Vec<sys::ggml_backend_dev_t>> {
    let all = devices::raw()?;
    if !names.is_empty() {
        let find = |name: &String| devices::find(&all, name, |_| true);
        return names.iter().map(find).collect();
    }
    let (gpus, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|(_, device)| device.is_gpu);
    let cpus = others.into_iter().filter(|(_, device)| device.is_cpu);
    let chosen = match gpus.is_empty() {
        true => cpus.collect(),
        false => gpus,
    };
    Ok(chosen.into_iter().map(|(raw, _)| raw).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_that_of_the_header() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = root.join("vendor/llama-cpp-sys-2/llama.cpp/ggml");
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
        let header = read("include/ggml-rpc.h");
        for (name, value) in ["MAJOR", "MINOR", "PATCH"].into_iter().zip(VERSION) {
            let line = format!("#define RPC_PROTO_{name}_VERSION    {value}\n");
            assert!(header.contains(&line), "{line}");
        }
        let caps = read("src/ggml-rpc/transport.h");
        assert!(caps.contains(&format!("RPC_CONN_CAPS_SIZE = {CAPS};")));
    }

    #[test]
    fn what_is_lost_is_named() {
        let line = "ggml-rpc.cpp:9: Remote RPC server a:1 crashed or returned malformed response";
        let said = lost(line).unwrap();
        assert!(said.starts_with("the worker at a:1 is gone"), "{said}");
        assert_eq!(lost("ggml.c:1: GGML_ASSERT(a) failed"), None);
    }

    #[test]
    fn addresses_that_are_none() {
        for endpoint in [
            "",
            "host",
            "host:",
            ":1",
            "host:0",
            "host:65536",
            "host:1:2",
            "host:x",
        ] {
            let error = greet(endpoint).unwrap_err().to_string();
            assert!(error.contains("expected HOST:PORT"), "{error}");
        }
    }
}
