use regex::Regex;

use super::*;

const FILES: [(&str, &str); 6] = [
    ("/", "text/html; charset=utf-8"),
    ("/index.html", "text/html; charset=utf-8"),
    ("/page.css", "text/css; charset=utf-8"),
    ("/page.js", "text/javascript; charset=utf-8"),
    ("/cache.js", "text/javascript; charset=utf-8"),
    ("/icon.svg", "image/svg+xml"),
];

#[tokio::test]
async fn the_page_is_there_for_anybody_and_runs_nothing_but_its_own() {
    let server = Server::with(Scripted::new("a"), |_, rules| {
        rules.keys = vec!["key".into()];
    });
    for (path, kind) in FILES {
        let reply = server.get(path).await;
        assert_eq!(reply.status, StatusCode::OK, "{path}");
        assert_eq!(reply.headers["content-type"], kind);
        assert_eq!(reply.headers["x-content-type-options"], "nosniff");
        assert_eq!(reply.headers["cache-control"], "no-cache");
        let csp = reply.headers["content-security-policy"].to_str().unwrap();
        let rules: Vec<&str> = csp.split("; ").collect();
        for rule in [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' data: blob:",
            "connect-src 'self'",
            "frame-ancestors 'none'",
        ] {
            assert!(rules.contains(&rule), "{path}: {csp}");
        }
        let tag = reply.headers["etag"].to_str().unwrap();
        let again = server.raw("GET", path, &[("if-none-match", tag)], "").await;
        assert_eq!(again.status, StatusCode::NOT_MODIFIED);
        assert_eq!(again.text, "");
        let other = [("if-none-match", "\"0\"")];
        let other = server.raw("GET", path, &other, "").await;
        assert_eq!(other.text, reply.text);
    }
    let reply = server.raw("POST", "/", &[], "").await;
    assert_eq!(reply.status, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn the_page_can_be_left_out() {
    let server = Server::with(Scripted::new("a"), |_, rules| rules.page = false);
    for (path, _) in FILES {
        assert_eq!(server.get(path).await.error().0, 404, "{path}");
    }
}

#[tokio::test]
async fn the_page_asks_nobody_else() {
    let server = Server::new("a");
    let address = Regex::new(r"(?i:(https?:)?//[a-z0-9]|@import)|\burl\(").unwrap();
    let comment = Regex::new(r"(?m)(^|\s)//.*$").unwrap();
    for (path, _) in FILES {
        let text = server.get(path).await.text;
        let text = text.replace("http://www.w3.org/2000/svg", "");
        let text = comment.replace_all(&text, "");
        let found = address.find(&text).map(|found| found.as_str());
        assert_eq!(found, None, "{path}");
    }
    // What the page's rules would stop is not there to begin with.
    let html = server.get("/").await.text;
    let inline = Regex::new(r#"(?i)<style|\sstyle=|\son[a-z]+=|<script>|javascript:"#).unwrap();
    assert_eq!(inline.find(&html).map(|found| found.as_str()), None);
    let named = Regex::new(r#"(?:src|href)="([^"]*)""#).unwrap();
    let mut n = 0;
    for named in named.captures_iter(&html) {
        let path = format!("/{}", &named[1]);
        assert!(FILES.iter().any(|(known, _)| *known == path), "{path}");
        n += 1;
    }
    assert_eq!(n, 4);
    // A model's answer is shown as text, never read as HTML.
    for path in ["/page.js", "/cache.js"] {
        let script = server.get(path).await.text;
        for way in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "Function(",
            "DOMParser",
        ] {
            assert!(!script.contains(way), "{path}: {way}");
        }
    }
}

#[tokio::test]
async fn every_part_that_the_script_looks_for_is_on_the_page() {
    let server = Server::new("a");
    let html = server.get("/").await.text;
    let wanted = Regex::new(r##"\b(?:one|getElementById)\("([a-z-]+)"\)"##).unwrap();
    let mut n = 0;
    for path in ["/page.js", "/cache.js"] {
        let script = server.get(path).await.text;
        for found in wanted.captures_iter(&script) {
            let id = format!("id=\"{}\"", &found[1]);
            assert!(html.contains(&id), "{path}: {id}");
            n += 1;
        }
    }
    assert!(n > 20, "{n}");
}
