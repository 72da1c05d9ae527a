//! The kernels as custom calls of XLA on CPU: what arrays each takes.

use crate::cpu_kernels::attend::Attention;
use crate::cpu_kernels::small_batch_matmul::{MAX_ROWS, Product};
use crate::cpu_kernels::top_k::Largest;
use crate::cpu_kernels::vector::Isa;
use crate::cpu_kernels::xla::{CallFrame, Error, handle};
use std::ffi::CStr;

const NO_VECTORS: &CStr = c"this processor has neither AVX-512 nor AVX2";
const OTHER_XLA: &CStr = c"rustbpe was built for another version of XLA";

/// Arguments x (m, k) and w (k, n), result y (m, n), float32, m at most `MAX_ROWS`.
///
/// # Safety
/// For XLA alone to call.
pub unsafe extern "C" fn skinny_matmul(frame: *mut CallFrame) -> Error {
    unsafe { handle(frame, product) }
}

fn product(frame: &CallFrame) -> Result<Product, &'static CStr> {
    let isa = Isa::detect().ok_or(NO_VECTORS)?;
    let wrong = c"skinny_matmul wants float32 x (m, k), w (k, n) and y (m, n) with m at most 64";
    if frame.arity().ok_or(OTHER_XLA)? != (2, 1) {
        return Err(wrong);
    }
    let (x, [m, k]) = frame.argument(0).ok_or(wrong)?;
    let (w, [k_of_w, n]) = frame.argument(1).ok_or(wrong)?;
    let (y, y_shape) = frame.result(0).ok_or(wrong)?;
    if m > MAX_ROWS || k_of_w != k || y_shape != [m, n] {
        return Err(wrong);
    }
    // SAFETY: XLA's arrays have the shapes it says and live until the call returns, and so until `wait` has.
    Ok(unsafe { Product::new(isa, (x, w, y), (m, k, n), frame.threads()) })
}

/// Arguments q (n, H, D), old keys and values (N, S, D), new keys and values (n, R, D), all float32, places (b,), start
/// (b,), filled and window (scalars), all int32; result (n, H, D). See `attend`.
///
/// # Safety
/// For XLA alone to call.
pub unsafe extern "C" fn decode_attention(frame: *mut CallFrame) -> Error {
    unsafe { handle(frame, attention) }
}

fn attention(frame: &CallFrame) -> Result<Attention, &'static CStr> {
    let isa = Isa::detect().ok_or(NO_VECTORS)?;
    let wrong =
        c"decode_attention wants float32 q (n, H, D), old keys and values (N, S, D), new ones (n, R, D), int32 \
                  places (b,), start (b,), filled (), window (), b dividing n";
    if frame.arity().ok_or(OTHER_XLA)? != (9, 1) {
        return Err(wrong);
    }
    let (q, [n, heads, dim]) = frame.argument(0).ok_or(wrong)?;
    let (old_keys, [n_old, old, dim_old]) = frame.argument(1).ok_or(wrong)?;
    let (old_values, old_shape) = frame.argument(2).ok_or(wrong)?;
    let (places, [placed]) = frame.argument::<i32, 1>(3).ok_or(wrong)?;
    let (new_keys, [n_new, new, dim_new]) = frame.argument(4).ok_or(wrong)?;
    let (new_values, new_shape) = frame.argument(5).ok_or(wrong)?;
    let (start, [rows]) = frame.argument::<i32, 1>(6).ok_or(wrong)?;
    let (filled, []) = frame.argument::<i32, 0>(7).ok_or(wrong)?;
    let (window, []) = frame.argument::<i32, 0>(8).ok_or(wrong)?;
    let (y, y_shape) = frame.result(0).ok_or(wrong)?;
    let shapes = n_new == n && [dim_old, dim_new] == [dim, dim] && y_shape == [n, heads, dim] && placed == rows;
    if !shapes || old_shape != [n_old, old, dim] || new_shape != [n, new, dim] || !n.is_multiple_of(rows.max(1)) {
        return Err(wrong);
    }
    // SAFETY: XLA's arrays have the shapes it says and live until the call returns, and so until `wait` has.
    unsafe {
        let start = std::slice::from_raw_parts(start, rows).to_vec();
        let places = std::slice::from_raw_parts(places, rows).to_vec();
        let arrays = (q, old_keys, old_values, new_keys, new_values, y);
        Attention::new(
            isa,
            arrays,
            (n, heads, dim, n_old, old, new),
            (places, start),
            *filled,
            *window,
            frame.threads(),
        )
        .ok_or(c"decode_attention: rows or tokens are said to be where the arrays have none")
    }
}

/// Arguments x (b, n) float32 and k (b,) int32; result (b, n): the k largest of each row, else -infinity. See `largest`.
///
/// # Safety
/// For XLA alone to call.
pub unsafe extern "C" fn keep_largest(frame: *mut CallFrame) -> Error {
    unsafe { handle(frame, largest) }
}

fn largest(frame: &CallFrame) -> Result<Largest, &'static CStr> {
    let wrong = c"keep_largest wants float32 x (b, n), int32 k (b,) and y (b, n)";
    if frame.arity().ok_or(OTHER_XLA)? != (2, 1) {
        return Err(wrong);
    }
    let (x, [rows, n]) = frame.argument(0).ok_or(wrong)?;
    let (k, [rows_of_k]) = frame.argument::<i32, 1>(1).ok_or(wrong)?;
    let (y, y_shape) = frame.result(0).ok_or(wrong)?;
    if rows_of_k != rows || y_shape != [rows, n] {
        return Err(wrong);
    }
    // SAFETY: XLA's arrays have the shapes it says and live until the call returns; a result is no argument.
    unsafe {
        let k = std::slice::from_raw_parts(k, rows).to_vec();
        Ok(Largest::new(x, y, n, k, frame.threads()))
    }
}
