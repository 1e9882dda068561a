//! `cargo xtask vendor`: vendor/ = the pinned crates + patches/.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::layout::{self, Difference, Tree};
use crate::{patch, pin};

/// Lays out `vendor/`. Everything is put together and patched in memory first, so a patch that
/// does not apply leaves the folder as it was; where nothing differs nothing is touched.
///
/// # Errors
/// When a crate cannot be had, a patch does not apply, or a file cannot be written.
pub fn run(root: &Path) -> Result<()> {
    let vendor = root.join("vendor");
    let aside = vendor.join(".replaced");
    let mut work = Vec::new();
    for (name, tree) in expected(root)? {
        let differences = layout::compare(&tree, &vendor.join(&name))?;
        work.push((name, tree, differences));
    }
    let replaces = |list: &[Difference]| list.iter().any(|d| !matches!(d, Difference::Missing(_)));
    if aside.exists() && work.iter().any(|(_, _, differences)| replaces(differences)) {
        fs::remove_dir_all(&aside).with_context(|| aside.display().to_string())?;
    }
    for (name, tree, differences) in &work {
        let dir = vendor.join(name);
        let fresh = !dir.exists();
        layout::make_equal(tree, &dir, differences, &aside.join(name))?;
        match differences.len() {
            0 => eprintln!("vendor/{name}: up to date"),
            n if fresh => eprintln!("vendor/{name}: {n} files laid out"),
            n => {
                eprintln!("vendor/{name}: {n} files brought up to date");
                differences.iter().for_each(|d| eprintln!("  {d}"));
                if replaces(differences) {
                    eprintln!("  what was there lies in vendor/.replaced/{name}");
                }
            }
        }
    }
    Ok(())
}

/// Proves that `vendor/` is the pinned crates plus the patches. 0: it is; 1: it is not, and the
/// differing files were listed.
///
/// # Errors
/// As [`run`], except that nothing is written.
pub fn check(root: &Path) -> Result<u8> {
    let mut bad = 0;
    for (name, tree) in expected(root)? {
        let differences = layout::compare(&tree, &root.join("vendor").join(&name))?;
        bad += differences.len();
        report(&name, &tree, &differences);
    }
    if bad == 0 {
        return Ok(0);
    }
    eprintln!(
        "error: vendor/ is not the pinned crates plus patches/ ({bad} files): run `cargo xtask vendor`"
    );
    Ok(1)
}

fn report(name: &str, tree: &Tree, differences: &[Difference]) {
    match differences.len() {
        0 => println!("vendor/{name}: {} files as pinned and patched", tree.len()),
        n if n == tree.len()
            && differences
                .iter()
                .all(|d| matches!(d, Difference::Missing(_))) =>
        {
            println!("vendor/{name}: not laid out");
        }
        _ => {
            println!("vendor/{name}:");
            differences.iter().for_each(|d| println!("  {d}"));
        }
    }
}

/// Lays out the pinned crates as they come from the registry, for comparisons.
///
/// # Errors
/// As [`run`].
pub fn unpatched(root: &Path, dir: &Path) -> Result<()> {
    let dir = std::path::absolute(dir)?;
    for (name, tree) in pinned(root)? {
        let (to, aside) = (dir.join(&name), dir.join(".replaced").join(&name));
        let differences = layout::compare(&tree, &to)?;
        layout::make_equal(&tree, &to, &differences, &aside)?;
        eprintln!("{}: {} files written", to.display(), differences.len());
    }
    Ok(())
}

fn expected(root: &Path) -> Result<Vec<(String, Tree)>> {
    let mut crates = pinned(root)?;
    for (name, tree) in &mut crates {
        for patch in patch::read(&root.join("patches"), name)? {
            patch::apply(tree, name, &patch)?;
        }
    }
    Ok(crates)
}

fn pinned(root: &Path) -> Result<Vec<(String, Tree)>> {
    let manifest = root.join("vendor/pin/Cargo.toml");
    pin::read(&root.join("vendor/pin/Cargo.lock"))?
        .into_iter()
        .map(|pin| Ok((pin.name.clone(), pin::files(&pin, &manifest)?)))
        .collect()
}
