// Two registers as one vector, with the operators of a vector: GCC takes vectors that are wider than a register apart,
// element by element, where comparisons and conversions are among what is done with them.
#include <cstdint>

namespace penstock::PENSTOCK_ISA {

template <class V> struct Two { V low, high; };

template <class T> constexpr bool is_two = false;
template <class V> constexpr bool is_two<Two<V>> = true;
template <class V> static inline const V& low_of(const Two<V>& x) { return x.low; }
template <class V> static inline const V& high_of(const Two<V>& x) { return x.high; }
template <class S> static inline S low_of(S x) requires(!is_two<S>) { return x; }
template <class S> static inline S high_of(S x) requires(!is_two<S>) { return x; }

#define PENSTOCK_OPERATOR(op)                                                                              \
    template <class A, class B> requires(is_two<A> || is_two<B>)                                           \
    static inline auto operator op(const A& a, const B& b) {                                               \
        return Two<decltype(low_of(a) op low_of(b))>{low_of(a) op low_of(b), high_of(a) op high_of(b)};    \
    }
PENSTOCK_OPERATOR(+) PENSTOCK_OPERATOR(-) PENSTOCK_OPERATOR(*) PENSTOCK_OPERATOR(/)
PENSTOCK_OPERATOR(&) PENSTOCK_OPERATOR(|) PENSTOCK_OPERATOR(<<) PENSTOCK_OPERATOR(>>)
PENSTOCK_OPERATOR(<) PENSTOCK_OPERATOR(<=) PENSTOCK_OPERATOR(>) PENSTOCK_OPERATOR(>=)
PENSTOCK_OPERATOR(==) PENSTOCK_OPERATOR(!=)
#undef PENSTOCK_OPERATOR

template <class V> static inline Two<V> operator~(const Two<V>& x) { return {~x.low, ~x.high}; }
template <class V, class B> static inline Two<V>& operator+=(Two<V>& a, const B& b) { return a = a + b; }
template <class V, class B> static inline Two<V>& operator*=(Two<V>& a, const B& b) { return a = a * b; }
template <class V, class B> static inline Two<V>& operator|=(Two<V>& a, const B& b) { return a = a | b; }

}  // namespace penstock::PENSTOCK_ISA
