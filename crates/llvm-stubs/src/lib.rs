//! Definitions for the LLVM symbols that a CUDA build of this workspace refers to and never calls.
//!
//! cubecl-cuda carries two compilers. The feature `cubecl/cuda-cpp` makes C++ (NVRTC) the default, and nothing of LLVM is
//! called; but its code is linked. `.cargo/config.toml` sets `DOCS_RS`, on which the two LLVM build scripts skip the
//! download of an LLVM archive, and its symbols would then be undefined. This crate defines each as a function that says
//! its name and aborts. It does so under `DOCS_RS` alone: where a real LLVM is linked, it is empty.
//!
//! `src/symbols.in` is the list, made by `scripts/llvm-symbols.sh`. A symbol that an upgrade adds shows as a link error.

#[cfg(llvm_stubs)]
mod stubs {
    #![allow(non_snake_case)]

    macro_rules! stubs {
        ($($name:ident)*) => {
            $(
                // SAFETY: no other definition of the symbol exists in a build without LLVM.
                #[unsafe(no_mangle)]
                extern "C" fn $name() -> ! {
                    eprintln!(concat!("the LLVM function ", stringify!($name), " was called, but this build has no LLVM"));
                    std::process::abort();
                }
            )*
        };
    }

    include!("symbols.in");
}
