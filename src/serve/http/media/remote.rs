//! Pictures of other machines: by https alone, from public addresses alone, within limits.
//!
//! A name is looked up once for each step, all of its addresses are checked, and the connection goes to
//! one of those, so that a name cannot change its meaning in between. Each redirect is such a step.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use ureq::config::Config;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use url::{Host, Url};

use super::address::is_public;

/// Redirects to follow.
const REDIRECTS: usize = 3;
/// For all steps together.
const TIME: Duration = Duration::from_secs(20);

/// An address that may be asked.
pub(super) fn parse(address: &str) -> Result<Url, String> {
    let url = Url::parse(address).map_err(|e| format!("is no valid address: {e}"))?;
    if url.scheme() != "https" {
        return Err(format!("an address of {}, expected https", url.scheme()));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("an address with a user's name, expected none".into());
    }
    Ok(url)
}

/// The bytes there, where they are no more than `most`.
pub(super) fn fetch(url: &Url, most: u64) -> Result<Vec<u8>, String> {
    let end = Instant::now() + TIME;
    follow(url, look_up, |url, addresses| {
        let left = end.saturating_duration_since(Instant::now());
        get(url, addresses, most, left)
    })
}

/// What one step gives.
#[derive(Debug, PartialEq)]
enum Got {
    Bytes(Vec<u8>),
    Elsewhere(String),
}

fn follow(
    url: &Url,
    look_up: impl Fn(&str, u16) -> std::io::Result<Vec<SocketAddr>>,
    mut get: impl FnMut(&Url, Vec<SocketAddr>) -> Result<Got, String>,
) -> Result<Vec<u8>, String> {
    let mut url = url.clone();
    for _ in 0..=REDIRECTS {
        let addresses = addresses(&url, &look_up)?;
        match get(&url, addresses)? {
            Got::Bytes(bytes) => return Ok(bytes),
            Got::Elsewhere(to) => {
                let to = url
                    .join(&to)
                    .map_err(|e| format!("leads to no valid address: {e}"))?;
                url = parse(to.as_str())?;
            }
        }
    }
    Err(format!("leads on more than {REDIRECTS} times"))
}

/// The addresses to connect to, one at least.
fn addresses(
    url: &Url,
    look_up: impl Fn(&str, u16) -> std::io::Result<Vec<SocketAddr>>,
) -> Result<Vec<SocketAddr>, String> {
    let port = url.port_or_known_default().unwrap_or(443);
    let found = match url.host() {
        Some(Host::Ipv4(ip)) => vec![SocketAddr::new(IpAddr::V4(ip), port)],
        Some(Host::Ipv6(ip)) => vec![SocketAddr::new(IpAddr::V6(ip), port)],
        Some(Host::Domain(name)) => {
            look_up(name, port).map_err(|_| format!("{name:?} cannot be found"))?
        }
        None => return Err("an address without a host".into()),
    };
    let host = url.host_str().unwrap_or_default();
    if found.is_empty() {
        return Err(format!("{host:?} cannot be found"));
    }
    // One that is not public is the sign of a trap, whatever the others are.
    match found.iter().all(|address| is_public(address.ip())) {
        true => Ok(found),
        false => Err(format!("{host:?} is not on the public internet")),
    }
}

fn look_up(name: &str, port: u16) -> std::io::Result<Vec<SocketAddr>> {
    Ok((name, port).to_socket_addrs()?.collect())
}

/// Answers every name with addresses that were checked.
#[derive(Debug)]
struct Checked(Vec<SocketAddr>);

impl Resolver for Checked {
    fn resolve(
        &self,
        _: &ureq::http::Uri,
        _: &Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        const MOST: usize = 16;
        let mut out = self.empty();
        for &address in self.0.iter().take(MOST) {
            out.push(address);
        }
        Ok(out)
    }
}

/// One step: no redirect is followed, no proxy asked, no cookie sent.
fn get(url: &Url, addresses: Vec<SocketAddr>, most: u64, time: Duration) -> Result<Got, String> {
    let config = Config::builder()
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .proxy(None)
        .timeout_global(Some(time))
        .user_agent(concat!("hae/", env!("CARGO_PKG_VERSION")))
        .accept("image/*")
        .build();
    let agent = ureq::Agent::with_parts(config, DefaultConnector::default(), Checked(addresses));
    let failed = |e: ureq::Error| match e {
        ureq::Error::BodyExceedsLimit(_) => {
            format!("has more than {most} bytes, the limit for a picture")
        }
        ureq::Error::Timeout(_) => "takes too long to fetch".into(),
        other => format!("cannot be fetched: {other}"),
    };
    let mut response = agent.get(url.as_str()).call().map_err(failed)?;
    let status = response.status();
    if status.is_redirection() {
        let to = response
            .headers()
            .get("location")
            .and_then(|to| to.to_str().ok());
        let to = to.ok_or_else(|| format!("cannot be fetched: status {}", status.as_u16()))?;
        return Ok(Got::Elsewhere(to.to_owned()));
    }
    if !status.is_success() {
        return Err(format!("cannot be fetched: status {}", status.as_u16()));
    }
    // The limit itself still passes.
    let body = response
        .body_mut()
        .with_config()
        .limit(most.saturating_add(1));
    let bytes = body.read_to_vec().map_err(failed)?;
    match bytes.len() as u64 > most {
        true => Err(format!(
            "has more than {most} bytes, the limit for a picture"
        )),
        false => Ok(Got::Bytes(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    fn at(ip: &str) -> std::io::Result<Vec<SocketAddr>> {
        Ok(vec![SocketAddr::new(ip.parse().unwrap(), 443)])
    }

    #[test]
    fn only_plain_https_addresses_are_asked() {
        assert!(parse("https://example.org/a.png?b=c").is_ok());
        for address in [
            "http://example.org/a.png",
            "ftp://example.org/a.png",
            "https://user@example.org/",
            "https://u:p@example.org/",
            "https://",
            "https:/",
        ] {
            assert!(parse(address).is_err(), "{address}");
        }
    }

    #[test]
    fn addresses_inside_are_refused_however_they_are_written() {
        for host in [
            "127.0.0.1",
            "2130706433",
            "0x7f.1",
            "0177.0.0.1",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "169.254.169.254",
            "[fd00::1]",
        ] {
            let url = parse(&format!("https://{host}/")).unwrap();
            let error = addresses(&url, |_, _| at("1.1.1.1")).unwrap_err();
            assert!(
                error.contains("not on the public internet"),
                "{host}: {error}"
            );
        }
        let url = parse("https://inner.example/").unwrap();
        assert!(addresses(&url, |_, _| at("10.0.0.1")).is_err());
        let mixed = |_: &str, port| {
            let addresses = ["8.8.8.8", "127.0.0.1"].map(|ip| ip.parse().unwrap());
            Ok(addresses.map(|ip| SocketAddr::new(ip, port)).to_vec())
        };
        assert!(addresses(&url, mixed).is_err());
        assert!(addresses(&url, |_, _| Ok(Vec::new())).is_err());
        let url = parse("https://outer.example:8443/").unwrap();
        let found = addresses(&url, |_, port| {
            assert_eq!(port, 8443);
            at("8.8.8.8")
        });
        assert_eq!(found, Ok(at("8.8.8.8").unwrap()));
    }

    #[test]
    fn every_redirect_is_checked_anew() {
        let names = |name: &str, _| match name {
            "inner.example" => at("192.168.0.1"),
            _ => at("8.8.8.8"),
        };
        let url = parse("https://outer.example/0").unwrap();
        let asked = RefCell::new(Vec::new());
        let run = |to: &'static str| {
            asked.borrow_mut().clear();
            follow(&url, names, |url, _| {
                asked.borrow_mut().push(url.to_string());
                Ok(Got::Elsewhere(to.into()))
            })
        };
        for to in [
            "https://inner.example/",
            "https://127.0.0.1/",
            "http://outer.example/",
        ] {
            assert!(run(to).is_err(), "{to}");
            assert_eq!(asked.borrow().len(), 1, "{to}");
        }
        let error = run("/again").unwrap_err();
        assert_eq!(error, "leads on more than 3 times");
        assert_eq!(asked.borrow().len(), 4);
        let mut left = 3;
        let bytes = follow(&url, names, |_, _| {
            left -= 1;
            match left {
                0 => Ok(Got::Bytes(vec![7])),
                _ => Ok(Got::Elsewhere("/next".into())),
            }
        });
        assert_eq!(bytes, Ok(vec![7]));
    }

    /// A server for one question, on this machine.
    fn answers(answer: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut seen = Vec::new();
            let mut buffer = [0; 1024];
            while !seen.ends_with(b"\r\n\r\n") {
                let n = stream.read(&mut buffer).unwrap();
                seen.extend_from_slice(&buffer[..n]);
            }
            let _ = stream.write_all(answer);
        });
        address
    }

    #[test]
    fn a_step_asks_the_checked_address_and_keeps_to_the_limit() {
        // `get` itself does not ask for https: `parse` does.
        let url = Url::parse("http://no.such.host.invalid/a.png").unwrap();
        let time = Duration::from_secs(10);
        let ok = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabcd";
        let got = get(&url, vec![answers(ok)], 4, time);
        assert_eq!(got, Ok(Got::Bytes(b"abcd".to_vec())));
        let error = get(&url, vec![answers(ok)], 3, time).unwrap_err();
        assert!(error.contains("more than 3 bytes"), "{error}");
        let moved =
            b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1/\r\nContent-Length: 0\r\n\r\n";
        let got = get(&url, vec![answers(moved)], 3, time);
        assert_eq!(got, Ok(Got::Elsewhere("https://127.0.0.1/".into())));
        let gone = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
        let error = get(&url, vec![answers(gone)], 3, time).unwrap_err();
        assert!(error.contains("404"), "{error}");
    }

    #[test]
    fn a_slow_answer_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = Url::parse("http://slow.invalid/").unwrap();
        let address = listener.local_addr().unwrap();
        let error = get(&url, vec![address], 3, Duration::from_millis(200)).unwrap_err();
        assert_eq!(error, "takes too long to fetch");
    }
}
