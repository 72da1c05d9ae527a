//! The product of a few rows with a matrix, against a plain loop in double precision.

use rustbpe::cpu_kernels::small_batch_matmul::{Isa, MAX_ROWS, Product};
use rustbpe::cpu_kernels::work_queue::Job;

mod numbers;
use numbers::numbers;

fn product(isa: Isa, x: &[f32], w: &[f32], (m, k, n): (usize, usize, usize), threads: usize) -> Vec<f32> {
    assert_eq!((x.len(), w.len()), (m * k, k * n));
    let mut y = vec![f32::NAN; m * n];
    // SAFETY: the lengths are right and outlive `wait`; only available instructions are asked for.
    let product = unsafe { Product::new(isa, (x.as_ptr(), w.as_ptr(), y.as_mut_ptr()), (m, k, n), threads) };
    std::thread::scope(|scope| {
        for _ in 1..product.threads() {
            scope.spawn(|| product.work());
        }
        product.work();
        product.wait();
    });
    y
}

fn isas() -> impl Iterator<Item = Isa> {
    [Isa::Avx512, Isa::Avx2].into_iter().filter(|isa| isa.available())
}

#[test]
fn it_is_the_product_for_every_number_of_rows_and_odd_sizes() {
    let sizes =
        [(1, 1), (7, 5), (32, 32), (33, 31), (64, 128), (31, 129), (100, 513), (3, 2051), (40, 8192), (65, 9001)];
    for isa in isas() {
        for m in 1..=MAX_ROWS {
            for (k, n) in sizes {
                let (x, w) = (numbers(m * k, 1), numbers(k * n, 2));
                let y = product(isa, &x, &w, (m, k, n), 3);
                for row in 0..m {
                    for column in (0..n).step_by(1 + n / 200).chain([n - 1]) {
                        let exact: f64 = (0..k).map(|i| x[row * k + i] as f64 * w[i * n + column] as f64).sum();
                        let error = (y[row * n + column] as f64 - exact).abs();
                        assert!(error < 1e-6 * k as f64, "{isa:?} {m} {k} {n}: {error} at {row}, {column}");
                    }
                }
            }
        }
    }
}

#[test]
fn nothing_to_sum_is_zero_and_nothing_to_do_ends() {
    for isa in isas() {
        assert_eq!(product(isa, &[], &[], (2, 0, 3), 2), [0.0; 6]);
        assert!(product(isa, &[1.0], &[], (1, 1, 0), 2).is_empty());
        assert!(product(isa, &[], &[1.0], (0, 1, 1), 2).is_empty());
    }
}

#[test]
fn a_row_depends_neither_on_its_company_nor_on_the_threads() {
    let (k, n) = (300, 1100);
    let (x, w) = (numbers(MAX_ROWS * k, 3), numbers(k * n, 4));
    for isa in isas() {
        let all = product(isa, &x, &w, (MAX_ROWS, k, n), 1);
        for m in 1..MAX_ROWS {
            assert!(product(isa, &x[..m * k], &w, (m, k, n), 1 + m % 4) == all[..m * n], "{isa:?}, {m} rows");
        }
    }
}
