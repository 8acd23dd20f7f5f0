//! Turns the stubs on where the LLVM build scripts skip LLVM.
fn main() {
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(llvm_stubs)");
    if std::env::var_os("DOCS_RS").is_some() {
        println!("cargo::rustc-cfg=llvm_stubs");
    }
}
